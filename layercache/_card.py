"""The section of a model card that tells what a plan does, how to use it and where it is from."""

from __future__ import annotations

from collections.abc import Sequence

from layercache.plan import Plan


def section(
    plans: Sequence[Plan],
    repo_id: str,
    kind: str,
    filename: str,
    prompts_license: str | None = None,
    picture: str | None = None,
) -> str:
    """Markdown for a repository that holds plans.

    Args:
        plans: The plans in the file.
        repo_id: The repository.
        kind: `"Plan"` or `"PlanSet"`.
        filename: The file, with its folder in the repository.
        prompts_license: Licence of the calibration prompts.
        picture: A picture of the plan in the repository.
    """
    first = plans[0]
    default = "/" not in filename and filename in ("layercache_plan.json", "layercache_plans.json")
    where = f'"{repo_id}"' if default else f'"{repo_id}", filename="{filename}"'
    pipeline = str(first.setting.get("pipeline", "DiffusionPipeline"))
    call = _call(first)
    lines = [
        "## Faster with LayerCache",
        "",
        f"`{filename}` tells LayerCache (`pip install layercache-flow`) which steps and layers of "
        "this model to compute and how to predict the others. No weights change; without the plan "
        "the model is as before.",
        "",
        "```python",
        "# pip install 'layercache-flow[diffusers,hub]'",
        "import torch",
        f"from diffusers import {pipeline}",
        f"from layercache import {kind}",
        "from layercache.runtime import apply_plan",
        "",
        f'pipe = {pipeline}.from_pretrained("{repo_id}", torch_dtype=torch.bfloat16).to("cuda")',
        f"with apply_plan(pipe, {kind}.from_pretrained({where})):",
        f'    image = pipe("a prompt"{call}).images[0]',
        "```",
        "",
        "| steps | speedup | compute | PSNR, median (mean; worst prompt) | memory an image |",
        "|---|---|---|---|---|",
        *(_row(plan) for plan in plans),
        "",
        "All figures are foretold from calibration, none is measured on the running plan: the "
        "speedup from the times of the calibration machine, the PSNR against the uncached image "
        f"over {first.foretold_of}. They are no bounds; a prompt whose caption leaves much open "
        "can come out as another image. `layercache eval` measures on your own prompts.",
    ]
    if picture is not None:
        lines += ["", f"![the plan, step by step]({picture})"]
    lines += [
        "",
        f"Calibrated on {first.foretold_of}"
        + (f" (licence of the prompts: {prompts_license})" if prompts_license else "")
        + f", for {first.made_for}. Made with {first.generator}.",
    ]
    return "\n".join(lines)


def _call(plan: Plan) -> str:
    keys = ("guidance_scale", "true_cfg_scale", "height", "width", "num_frames")
    given = {"num_inference_steps": plan.num_steps}
    given |= {key: plan.setting[key] for key in keys if key in plan.setting}
    return "".join(f", {key}={value!r}" for key, value in given.items())


def _row(plan: Plan) -> str:
    p = plan.predicted
    quality = "exact"
    if p.psnr_median_db is not None and p.psnr_db is not None and p.psnr_worst_db is not None:
        quality = f"{p.psnr_median_db:.1f} dB ({p.psnr_db:.1f}; {p.psnr_worst_db:.1f})"
    return (
        f"| {plan.num_steps} | {p.speedup:.2f}x | {100 * p.compute_share:.0f} % | {quality} | "
        f"{p.cache_bytes / 2**20:.1f} MiB |"
    )
