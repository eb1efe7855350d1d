"""Write schedules that others have published as plans: `python plans/make_published.py`.

MeanCache's for Qwen-Image at 25, 17 and 10 of 50 steps. Only which steps are computed is theirs:
skipped ones repeat the last velocity, without MeanCache's correction. Nothing is calibrated or
measured, so no quality is foretold, and the speedup is that of the transformer alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler

from layercache import Budget, Options, Plan
from layercache.plan import Certificate, ModelFingerprint, Predicted, UnitPlan

STEPS, SIDE = 50, 1328
COMPUTED = {
    25: [*range(17), 24, 32, 40, 43, 45, 47, 48, 49],
    17: [*range(9), 10, 17, 24, 31, 38, 45, 48, 49],
    10: [0, 1, 3, 7, 14, 21, 28, 35, 42, 49],
}
SOURCE = "MeanCache (its released code for Qwen-Image); the schedule alone"


def qwen_image_sigmas(steps: int, side: int) -> tuple[float, ...]:
    """The noise levels of Qwen-Image's scheduler for a square picture, by its published config."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )
    tokens = (side // 16) ** 2
    slope = (0.9 - 0.5) / (8192 - 256)
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / steps, steps), mu=tokens * slope + 0.5 - slope * 256
    )
    return tuple(float(sigma) for sigma in scheduler.sigmas)


def published_plan(count: int) -> Plan:
    """The plan that computes `count` steps."""
    computed = COMPUTED[count]
    cells = "".join("#" if step in computed else "0" for step in range(STEPS))
    return Plan(
        generator="plans/make_published.py",
        model=ModelFingerprint(
            class_name="QwenImageTransformer2DModel",
            block_lists={"transformer_blocks": 60},
            # Of a configuration without any value that is not the class's default.
            architecture=hashlib.sha256(b"{}").hexdigest(),
        ),
        setting={
            "pipeline": "QwenImagePipeline",
            "scheduler": "FlowMatchEulerDiscreteScheduler",
            "num_inference_steps": STEPS,
            "height": SIDE,
            "width": SIDE,
        },
        sigmas=qwen_image_sigmas(STEPS, SIDE),
        branches=2,
        units=(UnitPlan(kind="step", cells=cells),),
        budget=Budget(fraction=count / STEPS),
        asked=Options(units=("step",), predictor="reuse"),
        predicted=Predicted(speedup=STEPS / count, compute_share=count / STEPS, cache_bytes=0),
        certificate=Certificate(solver="published", value=0.0),
        provenance={"published": SOURCE, "calibrated": False},
    )


if __name__ == "__main__":
    for count in COMPUTED:
        published_plan(count).save(
            Path(__file__).parent / "published" / f"meancache-qwen-image-{count}-of-{STEPS}.json"
        )
