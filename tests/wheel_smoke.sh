#!/usr/bin/env bash
# Installs the wheel given as argument into an empty environment, away from the sources, and uses it.
set -euo pipefail
wheel=$(realpath "$1")
where=$(mktemp -d)
trap 'rm -rf "$where"' EXIT
cd "$where"
"${PYTHON:-python3}" -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
env/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$wheel"
env/bin/python -W error::RuntimeWarning - <<'EOF'
import torch
import rmsnorm

assert rmsnorm.info().native, rmsnorm.info()
x = torch.tensor([0.1, 0.1, 0.2, 0.3], requires_grad=True)
y = rmsnorm.RMSNorm(4, eps=0.0)(x)
torch.testing.assert_close(y.detach(), torch.tensor([0.5164, 0.5164, 1.0328, 1.5492]), atol=5e-5, rtol=0)
y.sum().backward()
torch.testing.assert_close(x.grad @ x.detach(), torch.tensor(0.0), atol=1e-6, rtol=0)  # the gradient is orthogonal to x
EOF
# Without its extra, the command fails and says what to install.
if said=$(env/bin/rmsnorm 2>&1); then echo "rmsnorm without typer should fail" && exit 1; fi
[[ $said == *"pip install"*typer* ]] || { echo "rmsnorm without typer said: $said" && exit 1; }
echo "wheel smoke test passed: $(basename "$wheel")"
