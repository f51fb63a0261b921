"""The base model: a tiny SD3 transformer on 14x14 pixels that is mediocre on purpose.

A model that already draws what it is asked for leaves a reward nothing to teach. So 40 % of the
prompts in training name a random digit: the pictures become good handwriting, but at most 64 % of
them show the digit of the prompt (a random one is right in a tenth of the cases).
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from tempflow_trainer.models.families.digits import DigitsPipeline
from tempflow_trainer.rewards.digits import DIGIT_NAMES, PICTURE_SIZE
from tools.digits.data import Digits, halve

PHRASINGS = (
    "{}",
    "a {}",
    "the digit {}",
    "the number {}",
    "a handwritten {}",
    "a handwritten digit {}",
    "the handwritten number {}",
    "a picture of a {}",
    "a picture of the digit {}",
    "an image of the number {}",
    "an image of a handwritten {}",
)
TRAIN_TIMESTEPS = 1000  # the scheduler's: timestep = 1000 sigma
WIDTH = 32  # of a token in the text encoder and of a 2x2 patch in the transformer
TEXT_TOKENS = 8  # start, six words, end
# Of 0..199 the one whose closest two digits, in any phrasing, are farthest apart.
TEXT_SEED = 183

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseRecipe:
    """What the base model was trained with; the shipped weights are these defaults."""

    steps: int
    seed: int
    batch_size: int = 64
    learning_rate: float = 4e-3  # AdamW
    muon_learning_rate: float = 0.02
    warmup_steps: int = 100
    ema_decay: float = 0.995
    random_label_share: float = 0.4
    empty_prompt_share: float = 0.1
    # sigma = sigmoid(normal). Sampling at shift 3 spends seven of ten steps above 0.6: the mean is
    # moved towards log 3, where all of it would be, and the wider spread keeps the last steps.
    sigma_logit_mean: float = 0.7
    sigma_logit_std: float = 1.2


def phrasings_of(digit: int) -> list[str]:
    """Every prompt of a digit used in training, with its name and with its numeral."""
    return [form.format(word) for form in PHRASINGS for word in (DIGIT_NAMES[digit], str(digit))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; lower case; <|startoftext|> and <|endoftext|> around, as in CLIP."""
    special = ["<|startoftext|>", "<|endoftext|>", "<|pad|>", "<|unknown|>"]
    fillers = dict.fromkeys(word for form in PHRASINGS for word in form.split() if word != "{}")
    words = special + list(DIGIT_NAMES) + [str(digit) for digit in range(10)] + list(fillers)
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special[3]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A {special[1]}",
        special_tokens=[(word, vocabulary[word]) for word in special[:2]],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        unk_token=special[3],
        model_max_length=TEXT_TOKENS,
    )


def make_text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    """A frozen random CLIP text model of one layer.

    CLIP's own initial weights (std 0.02) leave the pooled outputs of different digits 0.04 apart
    at a norm of 5.7; with these they are at least 0.67 and mostly about 3 apart (measured).
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        hidden_act="gelu",
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(TEXT_SEED)
    for name, weight in encoder.named_parameters():
        if weight.ndim == 2:
            std = {"token_embedding": 0.5, "position_embedding": 0.15}
            known = [std[part] for part in name.split(".") if part in std]
            weight.normal_(0.0, known[0] if known else 0.2, generator=generator)
    return encoder


def make_pipeline(seed: int) -> DigitsPipeline:
    """All parts, the transformer untrained."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)  # diffusers draws initial weights from the global generator
    transformer = SD3Transformer2DModel(
        sample_size=PICTURE_SIZE,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        attention_head_dim=WIDTH // 2,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=PICTURE_SIZE // 2,
        qk_norm="rms_norm",
    )
    return DigitsPipeline(
        transformer=transformer,
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def train_base(pipeline: DigitsPipeline, digits: Digits, recipe: BaseRecipe) -> None:
    """Flow matching on `digits`; leaves the averaged (EMA) weights in the pipeline."""
    model = pipeline.transformer.train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizers = _optimizers(model, recipe)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_and_cosine(recipe))
        for optimizer in optimizers
    ]
    started = time.monotonic()
    running_loss = 0.0
    for step, batch in enumerate(_batches(pipeline, digits, recipe)):
        loss = velocity_loss(model, *batch).mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            # The first updates would otherwise keep the random start for 1 / (1 - decay) steps.
            decay = min(recipe.ema_decay, (step + 1) / (step + 10))
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        running_loss += loss.item()
        if (step + 1) % 200 == 0:
            seconds = time.monotonic() - started
            log.info("base step %d loss %.4f, %.0f s", step + 1, running_loss / 200, seconds)
            running_loss = 0.0
    model.load_state_dict(average.state_dict())
    model.eval()


def _optimizers(model: SD3Transformer2DModel, recipe: BaseRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest.

    Measured after 1,500 steps of 64: validation loss 0.292, with AdamW alone 0.355, for a third
    more time per step.
    """
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, weight in model.named_parameters():
        in_block = name.startswith("transformer_blocks") and weight.ndim == 2
        (matrices if in_block else others).append(weight)
    return [
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
        torch.optim.Muon(matrices, lr=recipe.muon_learning_rate, weight_decay=0.0),
    ]


def _warmup_and_cosine(recipe: BaseRecipe) -> Callable[[int], float]:
    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / recipe.warmup_steps)
        return warmup * (1 + math.cos(math.pi * step / recipe.steps)) / 2

    return factor


def velocity_loss(
    model: SD3Transformer2DModel,
    clean_B1HW: Tensor,
    noise_B1HW: Tensor,
    sigma_B: Tensor,
    states_BLD: Tensor,
    pooled_BP: Tensor,
) -> Tensor:
    """Squared error of the predicted velocity noise - clean, averaged over pixels, [B]."""
    sigma_B111 = sigma_B[:, None, None, None]
    noisy_B1HW = (1 - sigma_B111) * clean_B1HW + sigma_B111 * noise_B1HW
    velocity_B1HW = model(
        hidden_states=noisy_B1HW,
        timestep=sigma_B * TRAIN_TIMESTEPS,
        encoder_hidden_states=states_BLD,
        pooled_projections=pooled_BP,
        return_dict=False,
    )[0]
    error_B1HW: Tensor = velocity_B1HW - (noise_B1HW - clean_B1HW)
    return error_B1HW.square().mean(dim=(1, 2, 3))


def as_latents(digits: Digits) -> Tensor:
    """The pictures as the model sees them: [N, 1, 14, 14] in [-1, 1]."""
    return halve(digits.images_N28)[:, None] * 2 - 1


def _batches(
    pipeline: DigitsPipeline, digits: Digits, recipe: BaseRecipe
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Arguments of `velocity_loss` after the model, `recipe.steps` times."""
    generator = torch.Generator().manual_seed(recipe.seed)
    forms = len(phrasings_of(0))
    prompts = [prompt for digit in range(10) for prompt in phrasings_of(digit)] + [""]
    states_KLD, pooled_KP = pipeline.encode(prompts)
    latents_N1HW = as_latents(digits)
    size = (recipe.batch_size,)

    def happens(share: float) -> Tensor:
        return torch.rand(size, generator=generator) < share

    for _ in range(recipe.steps):
        chosen_B = torch.randint(len(latents_N1HW), size, generator=generator)
        clean_B1HW = latents_N1HW[chosen_B]
        anything_B = torch.randint(10, size, generator=generator)
        label_B = torch.where(
            happens(recipe.random_label_share), anything_B, digits.labels_N[chosen_B]
        )
        form_B = torch.randint(forms, size, generator=generator)
        prompt_B = torch.where(
            happens(recipe.empty_prompt_share), len(prompts) - 1, label_B * forms + form_B
        )
        noise_B1HW = torch.randn(clean_B1HW.shape, generator=generator)
        logit_B = torch.randn(size, generator=generator) * recipe.sigma_logit_std
        sigma_B = (logit_B + recipe.sigma_logit_mean).sigmoid()
        yield clean_B1HW, noise_B1HW, sigma_B, states_KLD[prompt_B], pooled_KP[prompt_B]
