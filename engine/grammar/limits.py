"""Bounds on what one grammar may cost. llguidance counts its own work and refuses what goes beyond; what it does not count
is cut off by the system, in the process that checks (`checker.py`)."""

from __future__ import annotations

from llguidance import LLParserLimits

# Of processor time, for compiling and the first mask.
MAX_COMPILE_S = 4
# Beside the tokenizer.
MAX_COMPILE_BYTES = 1 << 30
# Compiled at once.
MAX_CHECKS = 4
# A state takes 1 to 2 KB, and belongs to one request.
MAX_LEXER_STATES = 20_000


def parser_limits() -> LLParserLimits:
    """For a check and for the engine alike. A mask costs at most some tens of milliseconds: 14,000 units of the lexer's
    fuel, or 20,000 items of a row, take about one."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_items_in_row=2_000,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=500_000,
        # The caller's grammar is no matter of our logs.
        verbose_errors=False,
    )


def brief(message: str) -> str:
    """The library's reason, without what is for its own logs."""
    text = message.replace("<non-verbose/>", "").strip()
    return " ".join(text.split())[:500]
