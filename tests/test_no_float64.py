"""No float64 on the accelerator: MPS has none. A stand-in for a device that refuses it, on the CPU."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_fdfo.callbacks import EMA, BeforeAfter


class OnDevice(Tensor):
    """What was moved to the device or made there, and what is computed of it; `cpu()` brings it back."""


class RefusesFloat64(TorchFunctionMode):
    """As a device does that has no float64. `to(torch.device)` and `device=` go there; `cpu()` and `to("cpu")` back."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is Tensor.cpu or (function is Tensor.to and "cpu" in args):
            return result.as_subclass(Tensor)
        goes = any(isinstance(value, torch.device) for value in (*args, *kwargs.values()))
        return marked(result, goes)


def marked(result, goes):
    if isinstance(result, Mapping):
        return result
    if isinstance(result, tuple | list):
        kept = [marked(value, goes) for value in result]
        return type(result)(kept) if type(result) in (tuple, list) else result
    if not isinstance(result, Tensor) or not (goes or isinstance(result, OnDevice)):
        return result
    if result.dtype in (torch.float64, torch.complex128):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    return result if isinstance(result, OnDevice) or result.requires_grad else result.as_subclass(OnDevice)


def test_the_stand_in_refuses_what_mps_refuses():
    with RefusesFloat64():
        here = torch.ones(2).to(torch.device("cpu"))
        assert isinstance(here * 2, OnDevice)
        assert (here * 2).cpu().double().dtype == torch.float64
        for wrong in (here.double, lambda: torch.ones(2).double().to(torch.device("cpu"))):
            with pytest.raises(TypeError, match="float64"):
                wrong()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(1, dtype=torch.float64, device=torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:.*Mean of empty slice")
def test_a_run_needs_no_float64_on_its_device(toy_module, fit, judge, prompts_file):
    with RefusesFloat64():
        callbacks = [BeforeAfter(zoom=1), EMA()]
        fit(toy_module(), 1, val=str(prompts_file), callbacks=callbacks, num_sanity_val_steps=-1)
        assert set(callbacks[0].before) == set(callbacks[0].after) == {"reward", "brightness"}
        judge(toy_module(), "test")
        judge(toy_module(), "predict")
