"""A run of `mptfoundry.train` under Composer on the pretended GPU: `trainer.py CONFIG [key=value ...]`.

It prints what each training step waited for, as JSON.
"""

from __future__ import annotations

import json
import sys

import machine

machine.pretend()

from composer.devices import DeviceGPU  # noqa: E402
from composer.utils import dist  # noqa: E402

from mptfoundry import build, train  # noqa: E402
from mptfoundry.config.load import load_train_config  # noqa: E402
from mptfoundry.mpt.linear import Linear  # noqa: E402
from mptfoundry.plan.devices import Device  # noqa: E402
from mptfoundry.run.step_guard import StepGuard  # noqa: E402

H200 = Device("gpu", "NVIDIA H200", memory=machine.MEMORY, peak_flops=989.4e12, has_bf16=True, cores=4)

BF16 = "optimizer.bf16_weights=true"


def main(words: list[str]) -> None:
    device, steps = machine.Device(), []
    make, begin, end = build.build_model, StepGuard.before_dataloader, StepGuard.batch_end

    def on_the_gpu(*args, **kwargs):  # type: ignore[no-untyped-def]
        model = make(*args, **kwargs)
        with device.mode:
            machine.move(model)
        return model

    def note_start(guard, state, logger):  # type: ignore[no-untyped-def]
        begin(guard, state, logger)
        device.waits.clear()

    def note_end(guard, state, logger):  # type: ignore[no-untyped-def]
        end(guard, state, logger)
        layers = [layer for layer in state.model.modules() if isinstance(layer, Linear)]
        assert all((layer.compute_weight is not None) == (BF16 in words) for layer in layers)
        steps.append(dict(device.waits))

    build.build_model = on_the_gpu
    StepGuard.before_dataloader, StepGuard.batch_end = note_start, note_end
    DeviceGPU.module_to_device = lambda device, module: module
    dist.initialize_dist = lambda *args, **kwargs: None
    train.detect_device = lambda *args, **kwargs: H200
    config, _ = load_train_config(words[0], words[1:])
    with device:
        train.train(config)
    print(json.dumps(steps))


main(sys.argv[1:])
