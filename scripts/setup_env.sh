# Sourced: `setup_env EXTRAS` makes .venv where there is none, installs this project into it with
# these extras, and activates it. REFINE_JAX_VENV names another place.

setup_env() {
  local extras=$1 venv=${REFINE_JAX_VENV:-$PWD/.venv}
  if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: refine_jax needs Python 3.11 or later; python3 is $(python3 -V)." >&2
    exit 1
  fi
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
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
