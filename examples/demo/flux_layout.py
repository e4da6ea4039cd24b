"""What stands in a FLUX.1 folder in diffusers' layout: configs, and the text encoders' tensor names and shapes.

The names are the ones in FLUX.1's own files. They are written out here because the libraries' differ by release
(transformers 5 drops CLIP's `text_model.` prefix), while every release still reads these.
"""

from __future__ import annotations

from typing import Any

Shapes = dict[str, tuple[int, ...]]

SCALING, SHIFT = 0.3611, 0.1159
"""FLUX.1's VAE: a latent is (z - SHIFT) * SCALING."""

TRANSFORMER: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "out_channels": None,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": SCALING,
    "shift_factor": SHIFT,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
CLIP: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "bfloat16",
    "vocab_size": 49408,
}
T5: dict[str, Any] = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32128,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
MODEL_INDEX: dict[str, Any] = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def clip_shapes(config: dict[str, Any]) -> Shapes:
    """Name → shape of every tensor of `text_encoder/`."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (config["vocab_size"], width),
        "text_model.embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
    }
    linears = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    linears["self_attn.out_proj"] = linears.pop("self_attn.o_proj")
    linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"text_model.encoder.layers.{layer}."
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            shapes[f"{prefix}{name}.bias"] = shape[:1]
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{prefix}{name}.weight": (width,), f"{prefix}{name}.bias": (width,)}
    shapes |= {f"text_model.final_layer_norm.{name}": (width,) for name in ("weight", "bias")}
    return shapes


def t5_shapes(config: dict[str, Any]) -> Shapes:
    """Name → shape of every tensor of `text_encoder_2/`; the embedding stands there once, as `shared`."""
    width, inner = config["d_model"], config["d_ff"]
    heads = config["num_heads"] * config["d_kv"]
    shapes: Shapes = {"shared.weight": (config["vocab_size"], width)}
    for layer in range(config["num_layers"]):
        attention, forward = (f"encoder.block.{layer}.layer.{part}." for part in (0, 1))
        shapes |= {f"{attention}SelfAttention.{name}.weight": (heads, width) for name in "qkv"}
        shapes[f"{attention}SelfAttention.o.weight"] = (width, heads)
        if layer == 0:  # later layers reuse the first one's
            buckets = (config["relative_attention_num_buckets"], config["num_heads"])
            shapes[f"{attention}SelfAttention.relative_attention_bias.weight"] = buckets
        shapes[f"{attention}layer_norm.weight"] = (width,)
        shapes |= {f"{forward}DenseReluDense.{name}.weight": (inner, width) for name in ("wi_0", "wi_1")}
        shapes[f"{forward}DenseReluDense.wo.weight"] = (width, inner)
        shapes[f"{forward}layer_norm.weight"] = (width,)
    shapes["encoder.final_layer_norm.weight"] = (width,)
    return shapes


def diffusers_shapes(config: dict[str, Any]) -> Shapes:
    """Name → shape of every tensor of `transformer/` or `vae/`, asked of diffusers itself without making one."""
    import diffusers  # noqa: PLC0415 - the rest of this file needs no library
    import torch  # noqa: PLC0415

    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
