"""A headless Chromium, told what to do by its DevTools protocol."""

import asyncio
import base64
import contextlib
import json
import re
import shutil
import subprocess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0")
_QUIET = ("--no-first-run", "--disable-extensions", "--disable-background-networking")


class Tab:
  """One page. Its console errors and failed checks of its policy are in `problems`."""

  def __init__(self, socket):
    self._socket, self._count, self.problems = socket, 0, []

  async def call(self, method, **parameters):
    """The result of a command of the protocol."""
    self._count += 1
    asked = {"id": self._count, "method": method, "params": parameters}
    await self._socket.send_str(json.dumps(asked))
    while True:
      message = json.loads((await asyncio.wait_for(self._socket.receive(), 60)).data)
      if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
        self.problems.append(json.dumps(message["params"]))
      if message.get("id") == self._count:
        assert "error" not in message, message
        return message["result"]

  async def value(self, script):
    """What an expression gives in the page."""
    found = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
    assert "exceptionDetails" not in found, found
    return found["result"].get("value")

  async def until(self, script, seconds=30):
    """Waits until an expression is true in the page."""
    for _ in range(int(seconds / 0.05)):
      if await self.value(script):
        return
      await asyncio.sleep(0.05)
    raise AssertionError(f"{script} did not come true")

  async def key(self, key, code, text=""):
    """Presses a key."""
    given = {"key": key, "code": key, "windowsVirtualKeyCode": code}
    await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **given)
    await self.call("Input.dispatchKeyEvent", type="keyUp", **given)

  async def write(self, text):
    """Types into what has the focus."""
    await self.call("Input.insertText", text=text)

  async def size(self, width, height):
    """Gives the page's window a size."""
    given = {"deviceScaleFactor": 1, "mobile": width < 600}
    await self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **given)

  async def picture(self, path):
    """Writes a screenshot."""
    found = await self.call("Page.captureScreenshot", format="png")
    path.write_bytes(base64.b64decode(found["data"]))


@contextlib.asynccontextmanager
async def tab(url, place):
  """A browser with a page of this address; its files are in `place`."""
  import aiohttp

  words = [CHROMIUM, *_FLAGS, *_QUIET, f"--user-data-dir={place}", "about:blank"]
  log = place / "log"
  with log.open("w") as file:
    browser = subprocess.Popen(words, stdout=file, stderr=file)
  try:
    address = await _address(browser, log)
    async with aiohttp.ClientSession() as session:
      async with session.get(f"http://{address}/json") as response:
        pages = [one for one in await response.json() if one["type"] == "page"]
      async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
        result = Tab(socket)
        for domain in ("Page", "Log", "Runtime"):
          await result.call(f"{domain}.enable")
        await result.call("Page.navigate", url=url)
        yield result
  finally:
    browser.terminate()
    browser.wait(20)


async def _address(browser, log):
  for _ in range(600):
    found = re.search(r"ws://([^/]+)/", log.read_text())
    if found:
      return found[1]
    assert browser.poll() is None, log.read_text()
    await asyncio.sleep(0.05)
  raise AssertionError(log.read_text())
