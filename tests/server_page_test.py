"""The page at /, in a headless Chromium where there is one."""

import asyncio
import os
import re
from pathlib import Path

import browser
import pytest
import server_fixtures

import refine_jax

MARKUP = "what is <b id=evil>2</b>?<img src=x onerror='document.title=1'>"
ANSWERS = "[...document.querySelectorAll('.assistant .text')].map(n => n.textContent)"
DONE = "document.querySelector('#stop').disabled && document.querySelectorAll('.numbers').length =="


@pytest.fixture(scope="module")
def running(tmp_path_factory):
  model = server_fixtures.text_model(tmp_path_factory.mktemp("model"))
  limits = {"trace_tokens": 64, "context": 3000, "max_tokens": 2900}
  with server_fixtures.serving(model, **limits) as running:
    yield running


def test_the_page_needs_nothing_from_elsewhere(running):
  status, headers, page = server_fixtures.get(running, "/")
  assert status == 200 and headers["content-type"].startswith("text/html")
  assert not re.findall(r"(?:src|href)=\"(?!data:,)|https?://|@import|url\(", page)
  assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page)
  policy = headers["content-security-policy"]
  assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


@pytest.mark.skipif(not browser.CHROMIUM, reason="there is no Chromium")
def test_a_chat_in_a_browser(running, tmp_path):
  """Two turns with the keyboard, passes, markup as text, an answer stopped, two sizes of window."""
  pictures = Path(os.environ.get("SERVER_PAGE_PICTURES", tmp_path))

  async def chat():
    async with browser.tab(running.url, tmp_path) as page:
      await page.size(1200, 800)
      await page.until("document.querySelector('#model')?.textContent == 'tiny'")
      assert await page.value("document.activeElement.id") == "prompt"
      await page.value("(tokens.value = 30, trace.checked = true)")
      await page.write(MARKUP)
      await page.key("Enter", 13, "\r")
      await page.until(f"{DONE} 1")
      (first,) = await page.value(ANSWERS)
      assert await page.value("document.querySelector('.user .text').textContent") == MARKUP
      assert await page.value("document.querySelector('#evil, .turn img')") is None
      numbers = await page.value("document.querySelector('.numbers').textContent")
      assert re.match(r"30 tokens in \d+ passes, [\d.]+ a pass, \d+ a second", numbers)
      assert await page.value("document.querySelectorAll('.piece').length") > 3
      frame = "document.querySelector('iframe')"
      assert await page.value(f"{frame}.getAttribute('sandbox')") == ""
      assert "</table>" in await page.value(f"{frame}.srcdoc")
      await page.value(f"{frame}.parentNode.open = true")
      await asyncio.sleep(0.5)
      await page.picture(pictures / "wide.png")
      await page.value("(trace.checked = false)")
      await page.write("and then?")
      await page.key("Enter", 13, "\r")
      await page.until(f"{DONE} 2")
      second = (await page.value(ANSWERS))[1]
      await page.size(360, 640)
      await page.value("(document.querySelector('form details').open = true)")
      width = "document.documentElement.scrollWidth"
      assert await page.value(width) <= 360
      await page.picture(pictures / "narrow.png")
      # Escape stops an answer, and its slot is free.
      await page.value("(tokens.value = 2500)")
      await page.write("go on")
      await page.key("Enter", 13, "\r")
      last = "[...document.querySelectorAll('.assistant')].at(-1)"
      await page.until(f"{DONE.split(' && ')[0]} == false")
      await page.until(f"{last}.querySelectorAll('.piece').length > 20")
      await page.key("Escape", 27)
      await page.until(f"{DONE} 3 && log.textContent.includes('stopped')")
      # An error is shown, and the message can be sent again.
      await page.value("(tokens.value = 5000)")
      await page.write("once more")
      await page.key("Enter", 13, "\r")
      await page.until("document.querySelector('.bad')?.textContent.includes('at most 2900')")
      assert await page.value("$('prompt').value") == "once more"
      bad = [p for p in page.problems if "400" not in p]  # Chromium names the failed request
      assert not bad, bad
      return first, second

  first, second = asyncio.run(chat())
  server_fixtures.until(lambda: server_fixtures.idle(running))
  turns = [{"role": "user", "content": MARKUP}]
  want = refine_jax.generate(running.model, [turns], slots=8, max_new_tokens=30)
  assert first == want.texts[0]
  turns += [
    {"role": "assistant", "content": first},
    {"role": "user", "content": "and then?"},
  ]
  again = refine_jax.generate(running.model, [turns], slots=8, max_new_tokens=30)
  assert second == again.texts[0]
