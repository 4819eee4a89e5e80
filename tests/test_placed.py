"""Models whose weights accelerate moves about: loaded once per layer, and its hooks left alone whenever they come."""

from __future__ import annotations

import collections
import copy
import functools

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from models import LAYERS, batch_of, prompt, tiny_llava

import dyvte

CPU = torch.device("cpu")
EXITS = [2, 5]


def inputs() -> dict[str, torch.Tensor]:
    return batch_of(prompt(3, 5, seed=1), prompt(1, 9, seed=2))


def cpu_offload(folder):
    return accelerate.cpu_offload(tiny_llava(), execution_device=CPU)


def disk_offload(folder):
    model = tiny_llava()
    accelerate.disk_offload(model, str(folder), execution_device=CPU)
    return model


def whole_layers(folder):
    """Layers are loaded as a whole: accelerate's hook stands around the layer itself."""
    model = tiny_llava()
    accelerate.hooks.attach_align_device_hook(
        model,
        execution_device=CPU,
        offload=True,
        weights_map=dict(model.state_dict()),
        preload_module_classes=[type(model.get_decoder().layers[0]).__name__],
    )
    return model


def device_map(folder):
    """Half of the model on the disk, since it does not fit."""
    tiny_llava().save_pretrained(folder / "model")
    memory = {"cpu": sum(p.numel() * 4 for p in tiny_llava().parameters()) // 2}
    kind = type(tiny_llava())
    model = kind.from_pretrained(
        folder / "model", device_map="auto", max_memory=memory, offload_folder=str(folder / "disk")
    ).eval()
    assert "disk" in model.hf_device_map.values()
    model.generation_config.eos_token_id = None
    return model


WAYS = (cpu_offload, disk_offload, whole_layers, device_map)


@torch.no_grad()
def outcome(model, method=None):
    """Logits, an answer and traces with exits."""
    with dyvte.visual_exit(model, method or dyvte.FixedExit(EXITS)):
        logits = model(**inputs()).logits
        ids = model.generate(**inputs(), max_new_tokens=4, do_sample=False)
    return {"logits": logits, "ids": ids} | vars(dyvte.trace_batch(model, inputs()))


def assert_equal(found, expected):
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_equal_to_the_model_in_memory(way, tmp_path):
    assert_equal(outcome(way(tmp_path)), outcome(tiny_llava()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", [dyvte.FixedExit(EXITS), dyvte.FastV(2) & dyvte.FixedExit(EXITS)])
@torch.no_grad()
def test_weights_are_loaded_once_per_layer(way, method, tmp_path, monkeypatch):
    model, loads = way(tmp_path), collections.Counter()
    place = accelerate.hooks.set_module_tensor_to_device

    def counting(module, name, device, *args, **kwargs):
        if device != "meta":
            loads[module, name] += 1
        return place(module, name, device, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", counting)
    with dyvte.visual_exit(model, method) as handle:
        model(**inputs())
        loads.clear()  # attention that is read for the first time was checked, with one weight once more
        model(**inputs())
    assert loads and set(loads.values()) == {1}
    assert len(handle.counts.unique(dim=0)) > 1  # samples did part
    layers = model.get_decoder().layers
    assert any(p.is_meta for p in layers.parameters())  # and the weights are gone again


@pytest.mark.parametrize("part", ["layers", "all"])
def test_hooks_may_come_while_attached_and_stay(part):
    model, expected = tiny_llava(), outcome(tiny_llava())["logits"]
    handle = dyvte.attach(model, dyvte.FixedExit(EXITS))
    if part == "all":
        accelerate.cpu_offload(model, execution_device=CPU)
    else:
        for layer in model.get_decoder().layers:
            add_hook_to_module(layer, AlignDevicesHook(CPU, offload=True, place_submodules=True))
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, expected)
        handle.detach()
        assert torch.equal(model(**inputs()).logits, tiny_llava()(**inputs()).logits)
    layers = model.get_decoder().layers
    assert all(p.is_meta for p in layers.parameters())
    assert_equal(outcome(model), outcome(tiny_llava()))
    remove_hook_from_module(model, recurse=True)
    assert not any(p.is_meta for p in layers.parameters())
    assert_equal(outcome(model), outcome(tiny_llava()))
    copy.deepcopy(model)


def test_hooks_may_go_while_attached():
    model, expected = cpu_offload(None), outcome(tiny_llava())["logits"]
    handle = dyvte.attach(model, dyvte.FixedExit(EXITS))
    remove_hook_from_module(model, recurse=True)
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, expected)
        handle.detach()
        assert torch.equal(model(**inputs()).logits, tiny_llava()(**inputs()).logits)
    assert not any("_old_forward" in vars(module) for module in model.modules())
    copy.deepcopy(model)


@pytest.mark.parametrize("name", ["forward", "generate"])
def test_a_wrapper_of_somebody_else_stays(name):
    """As torch's register_fsdp_forward_method puts one around a method."""
    model, calls = tiny_llava(), []
    handle = dyvte.attach(model, dyvte.FixedExit(EXITS))
    method = getattr(model, name)

    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        calls.append(name)
        return method(*args, **kwargs)

    setattr(model, name, wrapper)
    handle.detach()
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, tiny_llava()(**inputs()).logits)
        model.generate(**inputs(), max_new_tokens=2, do_sample=False)
    assert calls and getattr(model, name) is wrapper
    assert handle.record == []


def test_nothing_is_left_behind():
    model = tiny_llava()
    before = [dict(vars(module)) for module in model.modules()]
    with dyvte.visual_exit(model, dyvte.FastV(2)):
        assert "forward" in vars(model.get_decoder().layers[LAYERS - 1])
    assert [dict(vars(module)) for module in model.modules()] == before
