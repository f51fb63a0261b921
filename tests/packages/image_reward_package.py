"""Runs where the package image-reward is installed: a small model where its loader looks, and what
the package itself says of pictures.

    python image_reward_package.py HUB FOLDER ASKED.json ANSWERS.safetensors

The package fixes the picture encoder's size, so that has all its 24 layers, though one set of
weights; the text encoder has two. Weights are random. ASKED is a list of [picture's file, prompt].
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
# As published, but with fewer layers and words; two more words are added by the package.
TEXT = {
    "architectures": ["BertModel"],
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "hidden_size": 768,
    "intermediate_size": 128,
    "num_attention_heads": 12,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": len(VOCABULARY) + 2 * len(LETTERS) + 2,
    "encoder_width": 1024,
    "add_cross_attention": True,
}


def save_tokenizer(hub: Path) -> None:
    """Letters as words of ``bert-base-uncased`` in the hub's cache."""
    folder = hub / "models--bert-base-uncased"
    files = folder / "snapshots" / ("0" * 40)
    for path in (folder / "refs", files):
        path.mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    words = [*VOCABULARY, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (files / "vocab.txt").write_text("\n".join(words))
    (files / "tokenizer_config.json").write_text('{"do_lower_case": true}')


def drawn(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights drawn anew, wide enough that picture and prompt count; of the picture encoder's
    layers all have those of the first, which a torch file holds once."""
    for name, value in state.items():
        if value.is_floating_point() and ".blocks." not in name.replace(".blocks.0.", "."):
            norm = value.dim() == 1 and name.endswith("weight")
            spread = (2 / value.shape[-1]) ** 0.5 if value.dim() == 2 else 0.05
            value.normal_(float(norm), spread)
    first = {name: value for name, value in state.items() if ".blocks.0." in name}
    for name, value in first.items():
        if "proj.weight" in name or "fc2.weight" in name:
            value.mul_(0.2)
        state.update({name.replace(".blocks.0.", f".blocks.{i}."): value for i in range(1, 24)})
    return state


def answers(folder: Path, asked: list[list[str]]) -> dict[str, torch.Tensor]:
    """The package's inference on files, as its own README calls it, and its input tensors."""
    import ImageReward as package  # noqa: N813 (a module)

    model: Any = package.load("ImageReward-v1.0", device="cpu", download_root=str(folder))
    words = model.blip.tokenizer(
        [prompt for _, prompt in asked],
        padding="max_length",
        truncation=True,
        max_length=35,
        return_tensors="pt",
    )
    with torch.no_grad():
        scores = [model.score(prompt, file) for file, prompt in asked]
    return {
        "scores": torch.tensor(scores),
        "input.pixels": torch.stack([model.preprocess(Image.open(file)) for file, _ in asked]),
        "input.input_ids": words["input_ids"],
        "input.attention_mask": words["attention_mask"],
    }


def main() -> None:
    hub, folder, asked, to = (Path(word) for word in sys.argv[1:])
    import ImageReward as package  # noqa: N813 (a module)

    torch.manual_seed(0)
    save_tokenizer(hub)
    folder.mkdir(parents=True)
    config = folder / "med_config.json"
    config.write_text(json.dumps(TEXT))
    made = package.ImageReward(med_config=str(config))
    torch.save(drawn(made.state_dict()), folder / "ImageReward.pt")
    save_file(answers(folder, json.loads(asked.read_text())), to)


if __name__ == "__main__":
    main()
