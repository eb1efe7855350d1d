"""LayerCache for ComfyUI: sampling by a plan, and measuring what plans are made of."""

from .nodes import LayerCacheCalibrate, LayerCachePlan

NODE_CLASS_MAPPINGS = {
    "LayerCachePlan": LayerCachePlan,
    "LayerCacheCalibrate": LayerCacheCalibrate,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LayerCachePlan": "LayerCache plan",
    "LayerCacheCalibrate": "LayerCache calibrate",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
