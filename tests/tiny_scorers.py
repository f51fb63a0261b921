"""Scorers' models of the published architectures, tiny and random, in folders as they are
published: what is loaded and how an image is read is real, only the weights mean nothing."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IMAGE_SIZE = 32
CONTEXT = 16
WORDS = ("a", "red", "dog", "photo", "of", "cat")


def seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(vocabulary)},
        merges=[],
        model_max_length=CONTEXT,
    )


def clip_config(words: Any) -> Any:
    from transformers import CLIPConfig

    shared = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
    }
    text = {
        **shared,
        "vocab_size": len(words),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    vision = {**shared, "image_size": IMAGE_SIZE, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)


def save_clip(folder: Path) -> Any:
    """A CLIP with tokenizer and image processor below ``folder``; the model."""
    from transformers import CLIPImageProcessorPil, CLIPModel

    words = tokenizer()
    model = seeded(lambda: CLIPModel(clip_config(words)))
    for part in (words, clip_processor(CLIPImageProcessorPil), model):
        part.save_pretrained(folder)
    return model.eval()


def clip_processor(kind: Any) -> Any:
    return kind(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )


def open_clip_layout(model: Any) -> dict[str, Tensor]:
    """The weights of a CLIP of transformers by the names that open_clip gives them."""
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    found = {"logit_scale": weights["logit_scale"]}
    for tower, prefix, layers in (("text", "", 2), ("vision", "visual.", 2)):
        for layer in range(layers):
            source = f"{tower}_model.encoder.layers.{layer}"
            target = f"{prefix}transformer.resblocks.{layer}"
            for kind in ("weight", "bias"):
                parts = [weights[f"{source}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
                found[f"{target}.attn.in_proj_{kind}"] = torch.cat(parts)
                for theirs, ours in (
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    found[f"{target}.{theirs}.{kind}"] = weights[f"{source}.{ours}.{kind}"]
    text, vision = "text_model.embeddings", "vision_model.embeddings"
    found["token_embedding.weight"] = weights[f"{text}.token_embedding.weight"]
    found["positional_embedding"] = weights[f"{text}.position_embedding.weight"]
    found["text_projection"] = weights["text_projection.weight"].T.contiguous()
    found["visual.proj"] = weights["visual_projection.weight"].T.contiguous()
    found["visual.class_embedding"] = weights[f"{vision}.class_embedding"]
    found["visual.positional_embedding"] = weights[f"{vision}.position_embedding.weight"]
    found["visual.conv1.weight"] = weights[f"{vision}.patch_embedding.weight"]
    for kind in ("weight", "bias"):
        found[f"ln_final.{kind}"] = weights[f"text_model.final_layer_norm.{kind}"]
        found[f"visual.ln_pre.{kind}"] = weights[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = weights[f"vision_model.post_layernorm.{kind}"]
    return found


def save_mask2former(folder: Path) -> Any:
    """An instance segmentation model that finds dogs, cats and mice; the model."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
        SwinConfig,
    )

    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label={0: "dog", 1: "cat", 2: "mouse"},
    )
    model = seeded(lambda: Mask2FormerForUniversalSegmentation(config))
    # Sure of its classes, so that something is found.
    with torch.no_grad():
        model.class_predictor.weight.mul_(40)
    model.save_pretrained(folder)
    processor = Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}, ignore_index=255)
    processor.save_pretrained(folder)
    return model.eval()
