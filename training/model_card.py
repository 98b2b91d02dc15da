"""The page that tells people what a network was made from and what it can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantitron.recon.networks.trained_network import NetworkDescription


def card_text(name: str, description: NetworkDescription, checksum: str) -> str:
    """The card as Markdown.

    Args:
        name: of the file of weights.
        description: with its ``card``.
        checksum: of the file.
    """
    card: Mapping[str, Any] = description.card
    shape = description.shape
    data = card.get("data", {})
    lines = [f"# {name}", "", f"{description.kind}, for research use only.", ""]
    if card.get("note"):
        lines += [str(card["note"]), ""]
    volumes = ", ".join(f"{count} {key}" for key, count in dict(data.get("volumes", {})).items())
    rows = {
        "trained on": f"{volumes}{'' if 'phantoms' in data.get('volumes', {}) else ' volumes'}, "
        f"{data.get('held_out')} held out (by {data.get('held_out_by')})",
        "checksum of the data": data.get("sha256"),
        "checksum of the weights": checksum,
        "network": f"U-Net, channels {_listed(shape.channels)}, {shape.blocks} blocks, attention on "
        f"{'levels ' + _listed(shape.attention) if shape.attention else 'no level'}, "
        f"{card.get('weights')} weights",
        "noise levels": f"{len(description.noise_levels)}, from {description.noise_levels[0]:g} to "
        f"{description.noise_levels[-1]:g}"
        if description.noise_levels
        else "none",
        "patch": " x ".join(map(str, description.patch)),
        "steps": f"{card.get('steps')} in {card.get('minutes')} minutes on {card.get('device')}",
        "last loss": card.get("loss"),
        "versions": ", ".join(f"{key} {value}" for key, value in dict(card.get("versions", {})).items()),
        "date": card.get("date"),
    }
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
    options = _flat(card.get("options", {}))
    lines += ["Options: " + ", ".join(f"{key} {value}" for key, value in options.items()) + ".", ""]
    validation = dict(card.get("validation", {}))
    for kind in ("slices", "slabs"):
        lines += _table(description.kind, kind, dict(validation.get(kind, {})))
    return "\n".join(lines)


def _table(purpose: str, kind: str, by_modality: dict[str, dict[str, list[float]]]) -> list[str]:
    """What validation measured before and after the network: PSNR, or of artifacts their energy."""
    if not by_modality:
        return []
    names = list(by_modality)
    if purpose == "artifact_removal":
        said = (
            f"Energy of the artifacts that were learned from over the error of held out {kind} in dB, "
            "reconstructed -> restored:"
        )
        first = ""
    else:
        said = f"PSNR of held out {kind} in dB, noisy -> denoised (peak 1, the 99.5th percentile):"
        first = "noise"
    lines = [said, "", f"| {first} | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for level in by_modality[names[0]]:
        cells = [f"{by_modality[name][level][0]:.2f} -> {by_modality[name][level][1]:.2f}" for name in names]
        lines.append(f"| {level} | {' | '.join(cells)} |")
    return [*lines, ""]


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = f"({_listed(value)})" if isinstance(value, list | tuple) else str(value)
    return flat


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in values)
