"""Lines of a run's record, complete, with the figures that a test cares about."""

from tempflow_api.record import Evaluation, Metrics, Spread, Summary

TIME = "2026-01-31T12:00:00Z"


def make_metrics(epoch: int, reward: float) -> Metrics:
    return Metrics.model_validate(
        {
            "epoch": epoch,
            "time": TIME,
            "reward": reward,
            "rewardStd": 0.5,
            "rewards": {"digit-ink": -0.25},
            "advantageZeroShare": 0.0,
            "loss": 0.0,
            "kl": 0.0,
            "ratioClippedShare": 0.0,
            "ratioDrift": 0.0,
            "gradNorm": 0.01,
            "images": 216,
            "imagesPerSecond": 200.0,
            "seconds": {"rollout": 0.5, "scoring": 0.1, "update": 0.2},
            "evaluations": {"rollout": 279, "training": 36, "reference": 0},
        }
    )


def make_evaluation(epoch: int, reward: float) -> Evaluation:
    return Evaluation(
        epoch=epoch,
        time=TIME,
        reward=reward,
        reward_std=0.5,
        rewards={"digit-ink": Spread(mean=reward, std=0.1)},
        diversity=0.25,
        images=8,
        grid=None,
    )


def make_summary(result: str) -> Summary:
    return Summary(
        epochs=4,
        reward_before=Spread(mean=-2.0, std=0.5),
        reward_after=Spread(mean=-1.0, std=0.25),
        rewards={},
        diversity=None,
        evaluations=71_400,
        images=21_600,
        peak_memory_bytes=640_000_000,
        result=result,
    )
