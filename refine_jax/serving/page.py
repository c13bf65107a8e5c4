"""The page at /: one file, with nothing from elsewhere."""

import base64
import functools
import hashlib
import importlib.resources
import re

from starlette.responses import Response


def response() -> Response:
  """The page, which may run its own script only, and talk to its own server only."""
  body, policy = _page()
  headers = {
    "Content-Security-Policy": policy,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
  }
  return Response(body, 200, headers, "text/html")


@functools.cache
def _page() -> tuple[bytes, str]:
  text = (importlib.resources.files("refine_jax.serving") / "page.html").read_text("utf-8")
  (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  policy = (
    f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
  )
  return text.encode(), policy
