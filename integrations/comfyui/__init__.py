"""LayerCache for ComfyUI: one node, which makes a plan a sampler and its noise levels."""

from .nodes import LayerCachePlan

NODE_CLASS_MAPPINGS = {"LayerCachePlan": LayerCachePlan}
NODE_DISPLAY_NAME_MAPPINGS = {"LayerCachePlan": "LayerCache plan"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
