"""`make demo`: a photograph goes in by URL, embeddings come out over gRPC, as Hugging Face would compute them.

Every step shows the command it runs, so that it can be repeated by hand. Output: `demo_output/`.
"""

from __future__ import annotations

import http.client
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import skimage.data
from PIL import Image
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent  # the working directory of all that follows
OUTPUT = Path("demo_output")
CHECKPOINT = OUTPUT / "Qwen2.5-VL-3B-random"
PHOTO = OUTPUT / "chelsea.jpg"
DEBUG_CLIENT = Path("tests/data/debug_client.py")
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 120

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    os.chdir(ROOT)
    OUTPUT.mkdir(exist_ok=True)
    step("A checkpoint of Qwen2.5-VL 3B's real shape: config, preprocessor and 1.3 GB of random vision tower")
    if (CHECKPOINT / "config.json").exists():
        console.print(f"already at {CHECKPOINT}")
    else:
        run(BIN / "rtp-mm", "init-checkpoint", CHECKPOINT, "--family", "qwen2_5_vl", "--size", "3b")

    step("A photograph: Chelsea the cat, from scikit-image (451 x 300, small enough for a CPU demo)")
    Image.fromarray(skimage.data.chelsea()).save(PHOTO, quality=92)
    console.print(str(PHOTO))

    port = free_ports()
    with server(port):
        step("The photograph to embeddings over gRPC; stage times come as trailing metadata")
        run(BIN / "rtp-mm", "embed", PHOTO, "--type", "image", "--server", f"127.0.0.1:{port + 1}")

        step("RTP-LLM's documented debug client, only its path and port changed; the answer is cached by now")
        client = OUTPUT / "debug_client.py"
        client.write_text(for_us(DEBUG_CLIENT.read_text(), port + 1))
        run(sys.executable, "-m", "rtp_mm.compat", client, longest=16)

    step("What the tower saw, with its patches, tokens and attention windows")
    run(BIN / "rtp-mm", "look", PHOTO, "--checkpoint", CHECKPOINT, "--out", OUTPUT / "look.png")

    step("The same checkpoint and photograph in Hugging Face transformers")
    run(BIN / "rtp-mm", "compare", PHOTO, "--checkpoint", CHECKPOINT)


def step(title: str) -> None:
    console.print(f"\n[bold cyan]{title}[/]")


def run(*command: object, longest: int | None = None) -> None:
    """Shows a command and runs it; of an output over `longest` lines, its ends. The demo stops where one fails."""
    arguments = [str(part) for part in command]
    console.print(f"[dim]$ {shlex.join([Path(arguments[0]).name, *arguments[1:]])}[/]")
    finished = subprocess.run(arguments, stdout=subprocess.PIPE if longest else None, text=True)
    if longest:
        lines = finished.stdout.splitlines()
        cut = len(lines) - longest
        shown = lines if cut <= 0 else [*lines[: longest // 2], f"... {cut} lines ...", *lines[-(longest // 2) :]]
        console.print(*shown, sep="\n", markup=False)
    if finished.returncode:
        sys.exit(f"the demo stops here: exit status {finished.returncode}")


@contextmanager
def server(port: int) -> Iterator[None]:
    """Starts the server as the documentation says, waits until it is ready and stops it with SIGTERM."""
    step("The server")
    options = {
        "START_PORT": str(port),
        "VIT_SEPARATION": "1",
        "ACT_TYPE": "bf16",
        "MODEL_TYPE": "qwen2_5_vl",
        "CHECKPOINT_PATH": str(CHECKPOINT),
    }
    listing = " ".join(f"{name}={value}" for name, value in options.items())
    console.print(f"[dim]$ {listing} python -m rtp_mm.start_server[/]")
    log = OUTPUT / "server.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "rtp_mm.start_server"]
        process = subprocess.Popen(command, env=os.environ | options, stdout=file, stderr=file)
    try:
        wait_until_healthy(process, port, log)
        yield
        step("Stopping the server")
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=60)
        console.print(f"SIGTERM: exit status {status}; its log is {log}")
        if status:
            sys.exit(f"the server ended with status {status}")
    finally:
        process.kill()
        process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    start = time.monotonic()
    with console.status("loading the tower; /health answers 503") as status:
        while not is_healthy(port):
            seconds = time.monotonic() - start
            if process.poll() is not None or seconds > START_TIMEOUT_S:
                sys.exit(f"the server did not start:\n{log.read_text()}")
            status.update(f"loading the tower, {seconds:.0f} s")
            time.sleep(0.2)
    console.print(f"/health on port {port} answers ok after {time.monotonic() - start:.1f} s; gRPC is on {port + 1}")


def is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()


def free_ports() -> int:
    """A port that is free together with the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def for_us(client: str, port: int) -> str:
    """The debug client with our photograph and port in place of its author's."""
    replacements = {"/mnt/nas1/hf/llava-v1.5-7b/1.jpg": str(PHOTO.resolve()), "localhost:12346": f"localhost:{port}"}
    for theirs, ours in replacements.items():
        if theirs not in client:
            sys.exit(f"{DEBUG_CLIENT} does not name {theirs}")
        client = client.replace(theirs, ours)
    return client


if __name__ == "__main__":
    main()
