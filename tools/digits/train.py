"""Trains the digits family from nothing and writes its assets. See README.md beside this file.

PYTHONPATH=sdk:trainer:. python -m tools.digits.train --out FOLDER [--only base|judges]
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import safetensors.torch
import torch

from tempflow_trainer.models.families.digits import DigitsPipeline
from tempflow_trainer.rewards.digits import LANDMARK_LEVELS, DigitClassifier, RbfJudge
from tools.digits.base import BaseRecipe, make_pipeline, train_base
from tools.digits.data import DEFAULT_CACHE, load_splits
from tools.digits.evaluate import report
from tools.digits.judges import JudgeRecipe, fit_judge, train_classifier


def save_pipeline(pipeline: DigitsPipeline, out: Path) -> None:
    pipeline.transformer.save_pretrained(out / "transformer")
    pipeline.text_encoder.save_pretrained(out / "text_encoder")
    # A tokenizer remembers the padding of its last call, and would ship it.
    pipeline.tokenizer.backend_tokenizer.no_padding()
    pipeline.tokenizer.save_pretrained(out / "tokenizer")
    pipeline.scheduler.save_pretrained(out / "scheduler")


def save_judges(classifier: DigitClassifier, judge: RbfJudge, out: Path) -> None:
    safetensors.torch.save_file(classifier.state_dict(), out / "classifier.safetensors")
    levels_MF = (judge.landmarks_MF * LANDMARK_LEVELS).round().to(torch.uint8)
    tensors = {
        "landmarks": levels_MF,
        "weights": judge.weights_M10.contiguous(),
        "bias": judge.bias_10,
        "gamma": torch.tensor(judge.gamma),
    }
    safetensors.torch.save_file(tensors, out / "judge.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the assets; a trial's is another than the package's",
    )
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the data")
    parser.add_argument("--only", choices=("base", "judges"), help="train only this part")
    parser.add_argument("--steps", type=int, default=20000, help="of the base model")
    parser.add_argument("--classifier-steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and pictures")
    parser.add_argument("--threads", type=int, default=1, help="2 is slower where cores are busy")
    arguments = parser.parse_args()
    # The root logger of a notebook or of a library may already be set up.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    torch.set_num_threads(arguments.threads)
    splits = load_splits(arguments.cache)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only != "base":
        classifier = train_classifier(
            splits["classifier"], steps=arguments.classifier_steps, seed=arguments.seed
        )
        judge = fit_judge(splits["judge"], JudgeRecipe(seed=arguments.seed))
        save_judges(classifier, judge, arguments.out)
    if arguments.only != "judges":
        pipeline = make_pipeline(arguments.seed)
        train_base(pipeline, splits["base"], BaseRecipe(steps=arguments.steps, seed=arguments.seed))
        save_pipeline(pipeline, arguments.out)
        report(pipeline, splits["test"], arguments.seed, grid=None)


if __name__ == "__main__":
    main()
