"""`vertebra doctor`: what this machine has, what works, what is slow."""

import json
from pathlib import Path
from typing import Any

import click

from vertebra.cli import options


@click.command("doctor")
@options.as_json
def command(as_json: bool) -> None:
    """Examine this machine: versions, devices (each is tested), memory, bf16, threads, extras, network settings."""
    from vertebra.training.doctor import examine

    facts = examine(Path.cwd())
    click.echo(json.dumps(facts) if as_json else "\n".join(lines(facts)))


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts as text."""
    bf16, memory = facts["bf16"], facts["memory_gb"]
    devices = {
        name: f"works, {found['gflops']} GFLOP/s in a matrix product" if found["ok"] else f"FAILS: {found['error']}"
        for name, found in facts["devices"].items()
    }
    extras = {name: found["version"] or f"missing; {found['gives']}" for name, found in facts["extras"].items()}
    found = [
        "versions: " + ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
        f"system: {facts['system']['name']}, {facts['system']['processor']}, {facts['system']['cores']} cores",
        f"memory: {memory['available']} of {memory['total']} GB free; disk: {facts['disk_free_gb']} GB free here",
        *(f"device {name}: {text}" for name, text in devices.items()),
        f"bf16: {bf16['cpu_gain']}x as fast as 32 bit on the processor; precision auto on {bf16['device']} is"
        f" {bf16['auto']}, {bf16['auto_depthwise']} for networks with depthwise convolutions",
        "threads: " + ", ".join(f"{name} {value or 'not set'}" for name, value in facts["threads"].items()),
        "network: " + ", ".join(f"{name} {value or 'not set'}" for name, value in facts["network"].items()),
        *(f"extra {name}: {text}" for name, text in extras.items()),
    ]
    return [*found, *(f"advice: {sentence}" for sentence in facts["advice"])]
