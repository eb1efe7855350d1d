"""A tiny, randomly initialised model of every supported class, with inputs for one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
Builder = Callable[[], tuple[dict[str, Any], Inputs]]

HEADS, HEAD_DIM, TEXT, BATCH = 2, 16, 5, 2
WIDTH = HEADS * HEAD_DIM


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


def _time(value: float = 0.5) -> Tensor:
    return torch.full((BATCH,), value)


def _ids(count: int, axes: int = 3, grid: int = 0) -> Tensor:
    ids = torch.zeros(count, axes)
    for i in range(count if grid else 0):
        ids[i, 1], ids[i, 2] = i // grid, i % grid
    return ids


def _qwen() -> tuple[dict[str, Any], Inputs]:
    config = {
        "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 4,
        "attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS, "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 16, 16), "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "encoder_hidden_states_mask": _ones(BATCH, TEXT).long(), "timestep": _time(),
        "img_shapes": [[(1, 4, 4)]] * BATCH,
    }  # fmt: skip


def _flux() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_channels": 4, "num_layers": 3, "num_single_layers": 4, "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS, "joint_attention_dim": 24, "pooled_projection_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 16, 4), "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "pooled_projections": _noise(BATCH, 24), "timestep": _time(),
        "img_ids": _ids(16, grid=4), "txt_ids": _ids(TEXT),
    }  # fmt: skip


def _flux2() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_channels": 4, "num_layers": 3, "num_single_layers": 4, "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS, "joint_attention_dim": 24, "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 16, 4), "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "timestep": _time(), "guidance": _ones(BATCH),
        "img_ids": _ids(16, 4, grid=4).expand(BATCH, -1, -1),
        "txt_ids": _ids(TEXT, 4).expand(BATCH, -1, -1),
    }  # fmt: skip


def _sd3() -> tuple[dict[str, Any], Inputs]:
    config = {
        "sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 4,
        "attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS, "joint_attention_dim": 24,
        "caption_projection_dim": WIDTH, "pooled_projection_dim": 24, "pos_embed_max_size": 8,
        "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 4, 4, 4), "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "pooled_projections": _noise(BATCH, 24), "timestep": _time(500.0),
    }  # fmt: skip


def _z_image() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_channels": 4, "dim": WIDTH, "n_layers": 4, "n_refiner_layers": 1, "n_heads": HEADS,
        "n_kv_heads": HEADS, "cap_feat_dim": 24, "axes_dims": [4, 6, 6], "axes_lens": [256, 32, 32],
    }  # fmt: skip
    return config, {
        "x": [_noise(4, 1, 8, 8) for _ in range(BATCH)], "t": _time(),
        "cap_feats": [_noise(TEXT, 24) for _ in range(BATCH)],
    }  # fmt: skip


def _hunyuan_video() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM, "num_layers": 3, "num_single_layers": 3,
        "num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": 24,
        "pooled_projection_dim": 24, "rope_axes_dim": (4, 6, 6),
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 4, 2, 4, 4), "timestep": _time(500.0),
        "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "encoder_attention_mask": _ones(BATCH, TEXT), "pooled_projections": _noise(BATCH, 24),
        "guidance": _ones(BATCH),
    }  # fmt: skip


def _hunyuan_video15() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_channels": 9, "out_channels": 4, "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM, "num_layers": 4, "num_refiner_layers": 1,
        "text_embed_dim": 24, "text_embed_2_dim": 20, "image_embed_dim": 12,
        "rope_axes_dim": (4, 6, 6), "target_size": 16, "task_type": "t2v",
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 9, 2, 4, 4), "timestep": _time(500.0),
        "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "encoder_attention_mask": _ones(BATCH, TEXT),
        "encoder_hidden_states_2": _noise(BATCH, 3, 20),
        "encoder_attention_mask_2": _ones(BATCH, 3),
        "image_embeds": torch.zeros(BATCH, 4, 12),
    }  # fmt: skip


def _hunyuan_image() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM, "num_layers": 3, "num_single_layers": 3,
        "num_refiner_layers": 1, "text_embed_dim": 24, "rope_axes_dim": (8, 8),
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 4, 4, 4), "timestep": _time(500.0),
        "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "encoder_attention_mask": _ones(BATCH, TEXT),
    }  # fmt: skip


def _wan() -> tuple[dict[str, Any], Inputs]:
    config = {
        "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "in_channels": 4,
        "out_channels": 4, "text_dim": 24, "freq_dim": 32, "ffn_dim": 48, "num_layers": 4,
        "rope_max_seq_len": 32,
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 4, 2, 4, 4), "timestep": _time(500.0),
        "encoder_hidden_states": _noise(BATCH, TEXT, 24),
    }  # fmt: skip


def _wan_vace() -> tuple[dict[str, Any], Inputs]:
    config, inputs = _wan()
    return config | {"vace_layers": [0, 2], "vace_in_channels": 6}, inputs | {
        "control_hidden_states": _noise(BATCH, 6, 2, 4, 4),
        "control_hidden_states_scale": torch.tensor([0.8, 1.2]),
    }


def _ltx() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM, "cross_attention_dim": WIDTH, "num_layers": 4,
        "caption_channels": 24,
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 2 * 4 * 4, 4), "timestep": _time(500.0),
        "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "encoder_attention_mask": _ones(BATCH, TEXT).bool(),
        "num_frames": 2, "height": 4, "width": 4,
    }  # fmt: skip


def _ltx2() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM, "cross_attention_dim": WIDTH, "audio_in_channels": 4,
        "audio_out_channels": 4, "audio_num_attention_heads": HEADS, "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16, "num_layers": 4, "caption_channels": 24,
        "rope_double_precision": False,
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 2 * 4 * 4, 4), "audio_hidden_states": _noise(BATCH, 6, 4),
        "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "audio_encoder_hidden_states": _noise(BATCH, TEXT, 24), "timestep": _time(500.0)[:, None],
        "sigma": _time(), "audio_sigma": _time(),
        "encoder_attention_mask": _ones(BATCH, TEXT), "audio_encoder_attention_mask":
        _ones(BATCH, TEXT), "num_frames": 2, "height": 4, "width": 4, "audio_num_frames": 6,
    }  # fmt: skip


def _lumina2() -> tuple[dict[str, Any], Inputs]:
    config = {
        "sample_size": 8, "in_channels": 4, "hidden_size": WIDTH, "num_layers": 4,
        "num_refiner_layers": 1, "num_attention_heads": HEADS, "num_kv_heads": 1,
        "multiple_of": 8, "axes_dim_rope": (4, 6, 6), "axes_lens": (64, 16, 16), "cap_feat_dim": 24,
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 4, 8, 8), "timestep": _time(),
        "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "encoder_attention_mask": _ones(BATCH, TEXT).bool(),
    }  # fmt: skip


def _sana() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM, "num_layers": 4, "num_cross_attention_heads": HEADS,
        "cross_attention_head_dim": HEAD_DIM, "cross_attention_dim": WIDTH, "caption_channels": 24,
        "sample_size": 4,
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 4, 4, 4), "timestep": _time(500.0),
        "encoder_hidden_states": _noise(BATCH, TEXT, 24),
    }  # fmt: skip


def _aura_flow() -> tuple[dict[str, Any], Inputs]:
    config = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 3,
        "num_single_dit_layers": 3, "attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS,
        "joint_attention_dim": 24, "caption_projection_dim": WIDTH, "pos_embed_max_size": 64,
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 4, 8, 8), "timestep": _time(),
        "encoder_hidden_states": _noise(BATCH, TEXT, 24),
    }  # fmt: skip


def _chroma() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_channels": 4, "num_layers": 3, "num_single_layers": 4, "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
        "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1,
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 16, 4), "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "timestep": _time(), "img_ids": _ids(16, grid=4), "txt_ids": _ids(TEXT),
        "attention_mask": _ones(BATCH, TEXT + 16).bool(),
    }  # fmt: skip


def _cogview4() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_channels": 4, "out_channels": 4, "num_layers": 4, "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS, "text_embed_dim": 24, "time_embed_dim": 8,
        "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8, "rope_axes_dim": (8, 8),
    }  # fmt: skip
    size = torch.tensor([[64, 64]]).repeat(BATCH, 1)
    return config, {
        "hidden_states": _noise(BATCH, 4, 8, 8), "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "timestep": _time(500.0), "original_size": size, "target_size": size,
        "crop_coords": torch.zeros_like(size),
    }  # fmt: skip


def _hidream() -> tuple[dict[str, Any], Inputs]:
    config = {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "num_single_layers": 3, "attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS,
        "caption_channels": [24, 20], "text_emb_dim": 28, "num_routed_experts": 2,
        "num_activated_experts": 1, "axes_dims_rope": (4, 6, 6), "max_resolution": (16, 16),
        "llama_layers": [0, 1, 0, 1, 0, 1], "force_inference_output": True,
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 4, 8, 8), "timesteps": _time(500.0),
        "encoder_hidden_states_t5": _noise(BATCH, TEXT, 24),
        "encoder_hidden_states_llama3": _noise(2, BATCH, 3, 20), "pooled_embeds": _noise(BATCH, 28),
    }  # fmt: skip


def _mochi() -> tuple[dict[str, Any], Inputs]:
    config = {
        "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "num_layers": 4,
        "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 24, "time_embed_dim": 8,
        "max_sequence_length": 16,
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 4, 2, 8, 8), "timestep": _time(500.0),
        "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "encoder_attention_mask": _ones(BATCH, TEXT).bool(),
    }  # fmt: skip


def _kandinsky5() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_visual_dim": 4, "in_text_dim": 24, "in_text_dim2": 20, "time_dim": 16,
        "out_visual_dim": 4, "model_dim": WIDTH, "ff_dim": 48, "num_text_blocks": 1,
        "num_visual_blocks": 4, "axes_dims": (4, 6, 6),
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(1, 2, 8, 8, 4), "encoder_hidden_states": _noise(1, TEXT, 24),
        "timestep": torch.tensor([500.0]), "pooled_projections": _noise(1, 20),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(TEXT),
    }  # fmt: skip


def _krea2() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_channels": 4, "num_layers": 4, "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS, "num_key_value_heads": 1, "intermediate_size": 48,
        "timestep_embed_dim": 16, "text_hidden_dim": 24, "num_text_layers": 3,
        "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 24,
        "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 16, 4), "encoder_hidden_states": _noise(BATCH, TEXT, 3, 24),
        "timestep": _time(),
        "position_ids": torch.cat([_ids(TEXT), _ids(16, grid=4)]),
    }  # fmt: skip


def _bria() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_channels": 4, "num_layers": 3, "num_single_layers": 4, "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS, "joint_attention_dim": 24, "axes_dims_rope": [4, 6, 6],
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 16, 4), "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "timestep": _time(), "img_ids": _ids(16, grid=4), "txt_ids": _ids(TEXT),
    }  # fmt: skip


def _ovis() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_single_layers": 4,
        "attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS, "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 16, 4), "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "timestep": _time(), "img_ids": _ids(16, grid=4), "txt_ids": _ids(TEXT),
    }  # fmt: skip


def _longcat() -> tuple[dict[str, Any], Inputs]:
    config = {
        "in_channels": 4, "num_layers": 3, "num_single_layers": 4, "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS, "joint_attention_dim": 24, "pooled_projection_dim": 24,
        "axes_dims_rope": [4, 6, 6],
    }  # fmt: skip
    return config, {
        "hidden_states": _noise(BATCH, 16, 4), "encoder_hidden_states": _noise(BATCH, TEXT, 24),
        "timestep": _time(), "img_ids": _ids(16, grid=4), "txt_ids": _ids(TEXT),
    }  # fmt: skip


def _cosmos3() -> tuple[dict[str, Any], Inputs]:
    config = {
        "head_dim": HEAD_DIM, "hidden_size": WIDTH, "intermediate_size": 48, "latent_channel": 4,
        "latent_patch_size": 2, "num_attention_heads": HEADS, "num_hidden_layers": 4,
        "num_key_value_heads": 1, "patch_latent_dim": 16, "vocab_size": 32,
        "rope_scaling": {"mrope_section": [4, 2, 2]},
    }  # fmt: skip
    frames, side = 2, 2
    patches = frames * side * side
    return config, {
        "input_ids": torch.arange(TEXT), "text_indexes": torch.arange(TEXT),
        "position_ids": torch.arange(TEXT + patches).expand(3, -1), "und_len": TEXT,
        "sequence_length": TEXT + patches,
        "vision_tokens": [_noise(1, 4, frames, 2 * side, 2 * side)],
        "vision_token_shapes": [(frames, side, side)],
        "vision_sequence_indexes": torch.arange(TEXT, TEXT + patches),
        "vision_mse_loss_indexes": torch.arange(TEXT, TEXT + patches),
        "vision_timesteps": torch.full((patches,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(frames)],
    }  # fmt: skip


BUILDERS: dict[str, Builder] = {
    "QwenImageTransformer2DModel": _qwen,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "SD3Transformer2DModel": _sd3,
    "ZImageTransformer2DModel": _z_image,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "HunyuanVideo15Transformer3DModel": _hunyuan_video15,
    "HunyuanImageTransformer2DModel": _hunyuan_image,
    "WanTransformer3DModel": _wan,
    "WanVACETransformer3DModel": _wan_vace,
    "LTXVideoTransformer3DModel": _ltx,
    "LTX2VideoTransformer3DModel": _ltx2,
    "Lumina2Transformer2DModel": _lumina2,
    "SanaTransformer2DModel": _sana,
    "AuraFlowTransformer2DModel": _aura_flow,
    "ChromaTransformer2DModel": _chroma,
    "CogView4Transformer2DModel": _cogview4,
    "HiDreamImageTransformer2DModel": _hidream,
    "MochiTransformer3DModel": _mochi,
    "Kandinsky5Transformer3DModel": _kandinsky5,
    "Krea2Transformer2DModel": _krea2,
    "BriaTransformer2DModel": _bria,
    "OvisImageTransformer2DModel": _ovis,
    "LongCatImageTransformer2DModel": _longcat,
    "Cosmos3OmniTransformer": _cosmos3,
}


def build(name: str, seed: int = 0, **changes: Any) -> tuple[nn.Module, Inputs]:
    """The model `name` and inputs; equal for equal seeds. `changes` go to its configuration.

    Parameters that diffusers starts at zero (gates, modulations, empty tables) are made random, so
    that every block matters.
    """
    torch.manual_seed(seed)
    config, inputs = BUILDERS[name]()
    model = getattr(diffusers, name)(**(config | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if not parameter.isfinite().all() or parameter.abs().max() == 0 or parameter.std() > 2:
                parameter.normal_(std=0.2)
    return model, inputs


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for value in output for tensor in tensors_of(value)]
    return []
