"""The adapters of diffusers' flow-matching transformers (read against diffusers 0.42).

H is the image or video stream, E the text stream. Refiner and text-encoder blocks are no groups:
they are a small share of the compute. HunyuanDiT and LongCat-AudioDiT have connections that jump
across blocks and are left out on purpose.

Of the refiners those are timeless whose arguments hold no time embedding. The token refiners of
HunyuanVideo and HunyuanImage, the text blocks of Kandinsky 5, the VACE blocks of Wan and the
guidance layer of Chroma take one. Projections of captions (HiDream's list, and single ones in other
models) see no timestep either, but comparing their arguments costs about as much as they do.
"""

from __future__ import annotations

from layercache.models.adapters import Adapter, BlockList

_H = ("hidden_states",)
_HE = ("hidden_states", "encoder_hidden_states")
_EH = ("encoder_hidden_states", "hidden_states")

# Double-stream blocks that return text first, then single-stream blocks that still take both.
_TEXT_FIRST = (
    BlockList("transformer_blocks", _HE, _EH),
    BlockList("single_transformer_blocks", _HE, _EH),
)
_IMAGE_FIRST = (
    BlockList("transformer_blocks", _HE, _HE),
    BlockList("single_transformer_blocks", _HE, _HE),
)
_ONE_STREAM = (BlockList("transformer_blocks", _H, _H),)

_BLOCK_LISTS: dict[str, tuple[BlockList, ...]] = {
    "QwenImageTransformer2DModel": (BlockList("transformer_blocks", _HE, _EH),),
    "FluxTransformer2DModel": _TEXT_FIRST,
    "Flux2Transformer2DModel": (
        BlockList("transformer_blocks", _HE, _EH),
        # Text and image are concatenated before this list, which therefore carries one stream.
        BlockList("single_transformer_blocks", _H, _H),
    ),
    "SD3Transformer2DModel": (BlockList("transformer_blocks", _HE, _EH),),
    "ZImageTransformer2DModel": (BlockList("layers", ("x",), ("x",)),),
    "HunyuanVideoTransformer3DModel": _IMAGE_FIRST,
    "HunyuanVideo15Transformer3DModel": (BlockList("transformer_blocks", _HE, _HE),),
    "HunyuanImageTransformer2DModel": _IMAGE_FIRST,
    "WanTransformer3DModel": (BlockList("blocks", _H, _H),),
    # Its VACE blocks run before these and always; what they make is added between these blocks.
    "WanVACETransformer3DModel": (BlockList("blocks", _H, _H),),
    "LTXVideoTransformer3DModel": _ONE_STREAM,
    "LTX2VideoTransformer3DModel": (
        BlockList(
            "transformer_blocks",
            ("hidden_states", "audio_hidden_states"),
            ("hidden_states", "audio_hidden_states"),
        ),
    ),
    "Lumina2Transformer2DModel": (BlockList("layers", _H, _H),),
    "SanaTransformer2DModel": _ONE_STREAM,
    "AuraFlowTransformer2DModel": (
        BlockList("joint_transformer_blocks", _HE, _EH),
        BlockList("single_transformer_blocks", _H, _H),
    ),
    "ChromaTransformer2DModel": (
        BlockList("transformer_blocks", _HE, _EH),
        BlockList("single_transformer_blocks", _H, _H, in_place=True),
    ),
    "CogView4Transformer2DModel": (BlockList("transformer_blocks", _HE, _HE),),
    "HiDreamImageTransformer2DModel": (
        BlockList("double_stream_blocks", _HE, _HE),
        BlockList("single_stream_blocks", _H, _H),
    ),
    "MochiTransformer3DModel": (BlockList("transformer_blocks", _HE, _HE),),
    "Kandinsky5Transformer3DModel": (
        BlockList("visual_transformer_blocks", ("visual_embed",), ("visual_embed",)),
    ),
    "Krea2Transformer2DModel": _ONE_STREAM,
    "BriaTransformer2DModel": (
        BlockList("transformer_blocks", _HE, _EH),
        BlockList("single_transformer_blocks", _HE, _EH, in_place=True),
    ),
    "OvisImageTransformer2DModel": _TEXT_FIRST,
    "LongCatImageTransformer2DModel": _TEXT_FIRST,
    "Cosmos3OmniTransformer": (
        BlockList("layers", ("und_seq", "gen_seq"), ("und_seq", "gen_seq")),
    ),
}

_TIMELESS: dict[str, tuple[str, ...]] = {
    # The second is there in models that take images too.
    "ZImageTransformer2DModel": ("context_refiner", "siglip_refiner"),
    "Lumina2Transformer2DModel": ("context_refiner",),
    "Krea2Transformer2DModel": ("text_fusion.layerwise_blocks", "text_fusion.refiner_blocks"),
}

ADAPTERS: dict[str, Adapter] = {
    name: Adapter(name, lists, _TIMELESS.get(name, ())) for name, lists in _BLOCK_LISTS.items()
}
"""Adapters by class name."""
