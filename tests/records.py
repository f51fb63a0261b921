"""Lines of a run's record, complete, with the figures that a test cares about."""

from tempflow_api.record import Evaluation, Metrics, Save, SelfTest, Spread, Summary

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


def make_save(epoch: int, error: str | None = None) -> Save:
    return Save(
        epoch=epoch,
        time=TIME,
        stall_seconds=0.5,
        stage_seconds=1.0,
        send_seconds=2.0,
        bytes=1 << 20,
        folder=None if error else f"checkpoints/step-{epoch:010d}-attempt-000000",
        error=error,
    )


def make_self_test() -> SelfTest:
    return SelfTest(
        configuration="c",
        time=TIME,
        seconds=1.5,
        device="cpu",
        precision="float32",
        trained_parameters=123_456,
        tensors_with_gradient=12,
        tensors_changed=12,
        reward=None,
        rollout_difference=0.0,
        full_call_difference=0.0,
        one_row_difference=1e-7,
        bound=1e-4,
    )
