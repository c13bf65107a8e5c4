"""Numbers in texts: every form by its value, and nothing else taken for one."""

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from refine_jax.evaluation import rationals, scoring

HALF = Fraction(1, 2)


@pytest.mark.parametrize(
  "text, value",
  [
    ("5", 5),
    ("-5", -5),
    ("+5", 5),
    ("5.", 5),
    ("007", 7),
    *((f"{minus}5", -5) for minus in "\u2212\u2013\u2010\u2011\ufe63\uff0d"),
    ("minus 5", -5),
    ("- 5", -5),
    ("x=-5", -5),
    ("it is -5", -5),
    ("(-5)", -5),
    ("**-5**", -5),
    ("$-5$", -5),
    ("-$5", -5),
    ("one\n- 5 apples", 5),
    (".5", HALF),
    ("-.5", -HALF),
    ("so ...5", 5),
    ("1e3", 1000),
    ("1.5E-3", Fraction(3, 2000)),
    ("3×10^2", 300),
    ("3 x 10^{-2}", Fraction(3, 100)),
    (r"3 \times 10^{2}", 300),
    ("3·10²", 300),
    ("10⁻³", Fraction(1, 1000)),
    ("1/2", HALF),
    ("-1 / 2", -HALF),
    ("½", HALF),
    ("2½", Fraction(5, 2)),
    ("-2 1/2", Fraction(-5, 2)),
    (r"\frac{1}{2}", HALF),
    (r"-\dfrac{1}{2}", -HALF),
    (r"\frac{-1}{2}", -HALF),
    (r"\frac12", HALF),
    (r"\cfrac{1}{2}", HALF),
    (r"$2\frac{1}{2}$", Fraction(5, 2)),
    ("1,234,567.5", Fraction("1234567.5")),
    ("12,34,567", 1234567),
    ("1_000", 1000),
    ("1'000", 1000),
    ("1\u202f000", 1000),
    ("1{,}000", 1000),
    (r"1\,000", 1000),
    ("50%", HALF),
    (r"50 \%", HALF),
    ("50 percent", HALF),
    ("10-3 = 7", 7),
    ("-5 - 3 = -8", -8),
    ("1200 or 7", 7),
    ("5, on 2024-01-15 at 12:30", 5),
    ("5; call 555-1234, 555-123-4567 or +1 555 123 4567", 5),
    ("5 (version 1.2.3, COVID-19, 3:4, 0x1F)", 5),
    ("5kg", 5),
    ("9" * 400, int("9" * 400)),
  ],
)
def test_a_number_is_read_by_its_value_in_every_form(text, value):
  assert rationals.last_number(text) == value


@pytest.mark.parametrize(
  "text",
  [
    "no idea",
    *("10-3", "5 - 3", "5 -3", "3 + 4", "3*5", "3 x 5", "2 * -3", "1/2/3", "5 ± 2", "--5"),
    *("10 minus 3", "5 times 3", "$10$ - $3$", "x - 5", "x-5", "5 - x", "5/x"),
    *("3–5", "3..5", "it is - 5", "2^5", "2**5", "x_1", r"\sqrt{2}", r"2\pi", "2√3", "1e3x"),
    *("2024-01-05", "1/2/2024", "5.1.2024", "12:30", "3:4", "1.2.3", "555-1234", "0x1F"),
    *(r"\frac{12}{-5}", r"\frac{1}2", r"\frac1{2}", r"\cfrac{1}{-2}", "1.e5", "5.e-1", "1//2"),
    *("±5", r"\pm 5", "log 5", r"\ln 5", "2 pi", "2pi"),
    *("1,5", "(1,2)", "0,123", "1.234,50", "12 000", "1/0", "5 10/2", "1e999999999"),
  ],
)
def test_what_is_not_surely_a_number_is_none(text):
  assert rationals.last_number(text) is None


def grouped(digits: str, mark: str) -> str:
  return f"{int(digits):,}".replace(",", mark)


@st.composite
def printed(draw, value: Fraction) -> str:
  """A rational in one of the forms that fit it."""
  n, d = abs(value.numerator), value.denominator
  scale = draw(st.integers(1, 9))
  forms = [f"{n * scale}/{d * scale}", rf"\frac{{{n}}}{{{d}}}", f"{100 * n}/{d}%"]
  if n > d > 1:
    forms += [f"{n // d} {n % d}/{d}", rf"{n // d}\frac{{{n % d}}}{{{d}}}"]
  tens = next((k for k in range(13) if 10**k % d == 0), None)
  if tens is not None:
    digits = str(n * 10**tens // d).rjust(tens + 1, "0")
    whole, rest = digits[: len(digits) - tens], digits[len(digits) - tens :]
    point = f".{rest}" if rest else ""
    marks = [",", "_", "'", "\u2009", "\u202f", "{,}"]
    forms += [whole + point, f"{whole}{point}0" if point else f"{whole}.0"]
    forms += [grouped(whole, draw(st.sampled_from(marks))) + point]
    forms += [f"{digits}e-{tens}", f"{digits}×10^{{-{tens}}}", rf"{digits} \times 10^{{-{tens}}}"]
    forms += [f"{int(digits) * 100}e-{tens}%"]
    if int(whole) == 0 and point:
      forms.append(point)
  sign = draw(st.sampled_from("-\u2212\u2013")) if value < 0 else ""
  around = draw(st.sampled_from(["%s", "it is %s.", "x = %s", "**%s**", "$%s$", "10 - 3 = %s kg"]))
  return around % (sign + draw(st.sampled_from(forms)))


rational = st.one_of(
  st.integers(-(10**6), 10**6).map(Fraction),
  st.fractions(-1000, 1000, max_denominator=1000),
  st.builds(Fraction, st.integers(-(10**7), 10**7), st.sampled_from([10, 100, 1000, 10**6])),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data(), rational)
def test_a_rational_is_read_back_from_every_form(data, value):
  assert rationals.last_number(data.draw(printed(value))) == value


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data(), rational, rational)
def test_two_rationals_never_match_in_any_form(data, value, other):
  nearby = data.draw(
    st.sampled_from([other, -value, value / 10, value + 1, value * 100, 1 - value])
  )
  assume(nearby != value)
  row = {"answer": data.draw(printed(value))}
  assert not scoring.numeric("Answer: " + data.draw(printed(nearby)), row)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
  st.integers(-99, 999), st.integers(0, 999), st.sampled_from(["-", " - ", "\u2013", "+", "*"])
)
def test_a_calculation_solves_nothing_by_its_last_operand(a, b, sign):
  text = f"Answer: {a}{sign}{b}"
  assert not any(scoring.numeric(text, {"answer": str(x)}) for x in (b, -b))


@settings(max_examples=200, deadline=2000, derandomize=True)
@given(st.text("0123456789.,-+*/^%e:x× \n\\{}()frac", max_size=300))
def test_any_text_is_read_in_time_without_an_error(text):
  rationals.last_number(text)
  rationals.whole_number_text(text)


@pytest.mark.parametrize(
  "piece", ["1", "1 ", "1,", "12,", "1-", "1/", "1 1/", "1.1", "-", "(", "1 : "]
)
def test_a_long_text_takes_no_time(piece):
  rationals.last_number(piece * (50_000 // len(piece)) + "5")
