"""Tiny random pipelines with real tokenizers, built from configurations: no download."""

import re
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SYMBOLS = [c for c in string.printable if not c.isspace() and not c.isupper()]


def clip_tokenizer() -> CLIPTokenizer:
    """Knows every printable character, so every prompt has tokens of its own."""
    pieces = [*SYMBOLS, *(f"{c}</w>" for c in SYMBOLS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77
    )


def t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *SYMBOLS]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def clip_text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_text_config(tokenizer))


def t5_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5035,
        shift_factor=0.0609,
    )


def sd3_pipeline(
    seed: int = 0, *, qk_norm: str | None = "rms_norm", dual_attention: tuple[int, ...] = ()
) -> StableDiffusion3Pipeline:
    """About 80,000 random parameters; the VAE halves the resolution.

    Queries and keys have a norm as in SD3.5, and no block a second attention, as in its Large.
    """
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=32,
        qk_norm=qk_norm,
        dual_attention_layers=dual_attention,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip_text_encoder(clip),
        tokenizer=clip,
        text_encoder_2=clip_text_encoder(clip),
        tokenizer_2=clip,
        text_encoder_3=t5_text_encoder(t5),
        tokenizer_3=t5,
    )


def save_sd3(folder: Path) -> Path:
    sd3_pipeline().save_pretrained(folder)
    return folder


def flux_pipeline(seed: int = 0) -> FluxPipeline:
    """About 120,000 random parameters, with an input for the guidance scale."""
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,  # 4 x the channels of the latent
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=CLIPTextModel(clip_text_config(clip)),
        tokenizer=clip,
        text_encoder_2=t5_text_encoder(t5),
        tokenizer_2=t5,
    )


# QwenImagePipeline cuts off the 34 tokens that its template has before the prompt, so these words
# are tokens, as they are for the real tokenizer.
TEMPLATE_WORDS = re.split(
    r"\||(?= )",
    "system|user|Describe the image by detailing the color shape size texture quantity text "
    "spatial relationships of the objects and background",
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A token a byte, but one a word of the template."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*sorted(ByteLevel.alphabet()), *specials]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, extra_special_tokens=specials[1:]
    )
    tokenizer.add_tokens(TEMPLATE_WORDS)
    return tokenizer


def qwen_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [1, 1, 2],
            "rope_theta": 1e6,
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def qwen_pipeline(seed: int = 0) -> QwenImagePipeline:
    """About 130,000 random parameters; the scheduler is set as the published model's is."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,  # 4 x the channels of the latent
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[1.5, 2.0, 2.5, 3.0],
    )
    return QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=autoencoder,
        text_encoder=qwen_text_encoder(tokenizer),
        tokenizer=tokenizer,
    )


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen3_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """28 layers: the pipeline reads the states of layers 9, 18 and 27."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    return Qwen3ForCausalLM(config)


def klein_pipeline(seed: int = 0, *, distilled: bool = False) -> Flux2KleinPipeline:
    """About 50,000 random parameters; statistics of the latents that are not those of noise."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    transformer = Flux2Transformer2DModel(
        in_channels=16,  # 4 x the channels of the latent
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
    )
    autoencoder.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    autoencoder.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    return Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=qwen3_text_encoder(tokenizer),
        tokenizer=tokenizer,
        is_distilled=distilled,
    )
