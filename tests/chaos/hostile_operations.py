"""Operators' mistakes: updates that cannot be, pauses at a bad moment, a process stopped and let go on."""

from __future__ import annotations

import asyncio
import base64
import shutil
import signal
import socket
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from support.serial_run import CHECKPOINT

from .hostile_clients import answered_or_refused
from .scene import Scene
from .service import HEARTBEAT_S, WEIGHT_SYNC_S, GoneError, RefusedError

PAUSES = ("abort", "retract", "in_place")


async def torn_updates(scene: Scene) -> str:
    """New weights that are not whole; then the same weights as before, whole, and everything is as it was."""
    kinds = [bad_folder, torn_folder, lonely_group]
    if scene.service.shape.kind == "server":
        kinds += [some_tensors, wrong_tensors, cut_file]
    kind = scene.choose.choice(kinds)
    # While an update has more to bring, requests wait or are told so.
    scene.witness.tolerates = {"refusal"}
    scene.witness.allowance_s = 2 * WEIGHT_SYNC_S
    what = await kind(scene)
    await restore(scene)
    return what


async def restore(scene: Scene) -> None:
    update = scene.service.control("update_weights_from_disk", model_path=str(CHECKPOINT), weight_version="default")
    try:
        await asyncio.wait_for(update, 30.0)
    except (RefusedError, GoneError, TimeoutError) as error:
        scene.faults.append(f"the whole weights were not taken: {error!r}")


async def expect_refusal(scene: Scene, what: str, name: str, **arguments: object) -> str:
    try:
        await scene.service.control(name, **arguments)
    except RefusedError as error:
        if error.status >= 500:
            scene.faults.append(f"{what}: {error}")
        return what
    except GoneError as error:
        scene.faults.append(f"{what}: {error}")
        return what
    scene.faults.append(f"{what}: was taken")
    return what


async def bad_folder(scene: Scene) -> str:
    path = scene.choose.choice(("/nowhere", "/etc/hostname", "/proc/self", "/dev", str(CHECKPOINT.parent)))
    return await expect_refusal(scene, f"an update from {path}", "update_weights_from_disk", model_path=path)


async def torn_folder(scene: Scene) -> str:
    """A checkpoint whose file ends early, or has noise in its header."""
    folder = Path(f"/tmp/chaos-{scene.seed}-{scene.service.place.folder.name}")
    shutil.copytree(CHECKPOINT, folder)
    try:
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        if scene.choose.random() < 0.5:
            data = data[: scene.choose.randrange(len(data))]
        else:
            place = scene.choose.randrange(2000)
            data[place : place + 8] = scene.choose.randbytes(8)
        file.write_bytes(data)
        return await expect_refusal(scene, "a torn checkpoint", "update_weights_from_disk", model_path=str(folder))
    finally:
        shutil.rmtree(folder)


async def lonely_group(scene: Scene) -> str:
    """A group whose trainer does not come, or is no trainer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if scene.choose.random() < 0.5:
            listener.close()
        return await expect_refusal(
            scene,
            "a group without a trainer",
            "init_weights_update_group",
            master_address="127.0.0.1",
            master_port=port,
            rank_offset=1,
            world_size=3,
            group_name=scene.name("group"),
            backend="gloo",
        )


async def some_tensors(scene: Scene) -> str:
    """One tensor of many: the engine waits for the others. Only a whole update ends that."""
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        name = scene.choose.choice(sorted(file.keys()))
        data = base64.b64encode(save({name: file.get_tensor(name)})).decode()
    update = scene.service.control("update_weights_from_tensor", safetensors=data)
    await answered_or_refused(scene, "a part of an update", update)
    await asyncio.sleep(scene.choose.choice((0.1, 1.0, WEIGHT_SYNC_S + 0.5)))
    return "one tensor of an update"


async def wrong_tensors(scene: Scene) -> str:
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        name = scene.choose.choice(sorted(file.keys()))
    tensors = {name: torch.zeros(scene.choose.choice(((1,), (0,), (3, 5), (1, 1, 1, 1))))}
    data = base64.b64encode(save(tensors)).decode()
    return await expect_refusal(scene, "a wrong shape", "update_weights_from_tensor", safetensors=data)


async def cut_file(scene: Scene) -> str:
    data = save({"model.norm.weight": torch.zeros(64)})
    cut = base64.b64encode(data[: scene.choose.randrange(len(data))]).decode()
    return await expect_refusal(scene, "a cut file", "update_weights_from_tensor", safetensors=cut)


async def pauses(scene: Scene) -> str:
    """In every mode, while requests run; a flush in the middle."""
    mode = scene.choose.choice(PAUSES)
    scene.witness.tolerates = {"abort"}
    scene.witness.allowance_s = 2.0
    service = scene.service
    for _ in range(scene.choose.randint(1, 3)):
        await answered_or_refused(scene, "a pause", service.control("pause_generation", mode=mode))
        await asyncio.sleep(scene.choose.uniform(0.0, 0.5))
        if scene.choose.random() < 0.5:
            await answered_or_refused(scene, "a flush", service.control("flush_cache"))
        await answered_or_refused(scene, "the end of a pause", service.control("continue_generation"))
        await asyncio.sleep(scene.choose.uniform(0.0, 0.3))
    return f"pauses, {mode}"


async def stop_and_continue(scene: Scene) -> str:
    """Any process sleeps for less than the heartbeat's bound: nobody dies of it."""
    role = scene.choose.choice(scene.service.shape.roles)
    seconds = scene.choose.uniform(0.2, 0.5 * HEARTBEAT_S)
    scene.witness.allowance_s = seconds
    process = scene.service.place.process(role)
    process.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        process.send_signal(signal.SIGCONT)
    return f"{role} stopped for {seconds:.1f} s"
