# Sourced: `setup_env EXTRAS` makes a virtual environment where there is none, installs this project
# into it with these extras, and activates it. PYTHON names the interpreter (python3), and
# REFINE_JAX_VENV the place: .venv, or .venv-3.12 for PYTHON=python3.12.

setup_env() {
  local extras=$1 python=${PYTHON:-python3} venv
  venv=${REFINE_JAX_VENV:-$PWD/.venv$(venv_suffix "$python")}
  if ! command -v "$python" >/dev/null; then
    echo "error: there is no $python; PYTHON names the interpreter to use." >&2
    exit 1
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: refine_jax needs Python 3.11 or later; $python is $("$python" -V)." >&2
    exit 1
  fi
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  if [ -n "${PYTHON:-}" ] && [ "$("$venv/bin/python" -V)" != "$("$python" -V)" ]; then
    echo "error: $venv has $("$venv/bin/python" -V), and PYTHON=$python is $("$python" -V);" \
      "remove it, or set REFINE_JAX_VENV to another place." >&2
    exit 1
  fi
  # What was installed, and from what: a second run with nothing changed skips pip.
  local wanted stamp="$venv/.refine_jax.$extras"
  wanted="$PWD $(cat setup.cfg pyproject.toml | sha256sum)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    "$venv/bin/python" -m pip install --quiet --upgrade pip
    "$venv/bin/python" -m pip install --quiet --editable ".${extras:+[$extras]}"
    echo "$wanted" >"$stamp"
  fi
  # shellcheck disable=SC1091
  . "$venv/bin/activate"
}

# "-3.12" for python3.12 and /usr/bin/python3.12, nothing for python3.
venv_suffix() {
  case ${1##*/} in
    python3.*) echo "-${1##*python}" ;;
  esac
}
