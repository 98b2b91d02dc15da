"""The pipelines that come with the package: one XML a method, its settings beside it as YAML."""

from __future__ import annotations

from importlib.resources import files


def pipeline_names() -> list[str]:
    """Names of all pipelines, sorted."""
    return sorted(
        entry.name.removesuffix(".xml") for entry in files(__name__).iterdir() if entry.name.endswith(".xml")
    )


def pipeline_text(name: str) -> str:
    """The XML of pipeline ``name``, in Gadgetron's grammar.

    Raises:
        KeyError: if there is no such pipeline.
    """
    entry = files(__name__) / f"{name}.xml"
    if name not in pipeline_names():
        raise KeyError(name)
    return entry.read_text(encoding="utf-8")


def settings_names() -> list[str]:
    """Names of all methods that have a settings file, sorted."""
    folder = files(__name__) / "settings"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def settings_text(name: str) -> str:
    """The YAML of the settings of method ``name``; sections ``all`` and one a sequence.

    Raises:
        KeyError: if the method has no settings file.
    """
    if name not in settings_names():
        raise KeyError(name)
    return (files(__name__) / "settings" / f"{name}.yaml").read_text(encoding="utf-8")
