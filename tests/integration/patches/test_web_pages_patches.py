"""The patches of LLaMA-Factory's web pages: applied together, undone completely, left out where upstream differs."""

import importlib
import inspect

import pytest

from llamafactory_ddm.integration.patches import compatibility

pytest.importorskip("gradio")


def pages(patches):
    """Return the modules of the web pages, and what their rows name in them."""
    interface = importlib.import_module("llamafactory.webui.interface")
    rows = [patch for patch in patches.PATCHES if patch.module.startswith("llamafactory.webui.")]
    targets = [(importlib.import_module(patch.module), patch.target.partition(":")[2]) for patch in rows]
    return interface, targets


def content(targets):
    return [dict(value) if isinstance(value := vars(module)[name], dict) else value for module, name in targets]


def test_all_are_applied_and_undone(upstream):
    patches = upstream[2]
    interface, targets = pages(patches)
    patches.undo(*(module.__name__ for module, _ in targets))
    plain, title = content(targets), interface.create_train_tab
    patches.after_web_pages(interface)
    active = content(targets)
    assert all(new != old for new, old in zip(active, plain, strict=True))
    assert interface.create_train_tab is not title and interface.CSS in active
    patches.after_web_pages(interface)
    assert content(targets) == active
    patches.undo(*(module.__name__ for module, _ in targets))
    assert content(targets) == plain and interface.create_train_tab is title


def test_pages_that_differ_are_left_alone_and_the_reason_is_given(upstream, monkeypatch):
    patches = upstream[2]
    interface, targets = pages(patches)
    patches.undo(*(module.__name__ for module, _ in targets))
    plain = content(targets)
    assert compatibility.web_incompatibilities() == []
    runner = importlib.import_module("llamafactory.webui.runner").Runner
    monkeypatch.setattr(runner, "_parse_eval_args", lambda self, values: {})
    monkeypatch.delattr(importlib.import_module("llamafactory.webui.control"), "change_stage")
    with pytest.raises(compatibility.IncompatibleUpstream, match=r"_parse_eval_args\(self, data, .*change_stage"):
        patches.after_web_pages(interface)
    monkeypatch.undo()
    assert content(targets) == plain and patches.is_active()


def test_pages_are_not_touched_while_the_plugin_is_not_active(upstream):
    patches = upstream[2]
    interface, targets = pages(patches)
    patches.undo()
    plain = content(targets)
    patches.after_web_pages(interface)
    assert content(targets) == plain
    assert inspect.getmodule(interface.create_ui).__name__ == "llamafactory.webui.interface"
