"""Workers that Ray starts, by LLaMA-Factory's own code, train the model that torchrun's processes train."""

import pytest

from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.cli import history, run, train_in_processes

SMALL = (
    "mask_token=10",
    "max_steps=3",
    "warmup_steps=0",
    "logging_steps=1",
    'eval_strategy="no"',
    "do_eval=false",
    "save_strategy=no",
    "plot_loss=false",
    "cutoff_len=64",
    "per_device_train_batch_size=4",
    "overwrite_cache=true",
    "use_cpu=true",
)


@pytest.mark.slow
def test_two_workers_train_as_two_processes_of_torchrun(small_data, tmp_path):
    pytest.importorskip("ray")
    keys = ("examples/tiny_gpt2_full_ddm_sft.yaml", *SMALL, "model_name_or_path=data/tiny_gpt2")
    keys += (f"dataset_dir={small_data}",)
    by_torchrun, by_ray = tmp_path / "torchrun", tmp_path / "ray"
    train_in_processes(2, *keys, f"output_dir={by_torchrun}")
    # A Ray cluster of CPUs has the number that it is told.
    workers = ("ray_num_workers=2", 'ray_init_kwargs={"num_cpus": 20}', f"output_dir={by_ray}")
    env = {"USE_RAY": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    run(*keys, *workers, program="tests/e2e/ray_on_cpu.py", env=env, fresh=True)
    for a, b in zip(history(by_torchrun), history(by_ray), strict=True):
        for key in ("loss", "nll", "masked_fraction", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-6), key
    assert DiffusionConfig.load(by_ray) == DiffusionConfig.load(by_torchrun)
