"""Words of a caption as the Penn Treebank cuts them, after Stanford's tokenizer 3.4.1, on which caption scores rest.

`pycocoevalcap` runs that tokenizer (Java, -preserveLines -lowerCase) and drops the marks in `DROPPED`. Its habits
that move scores are kept: "don't" is "do n't"; hyphens and slashes hold words together; brackets become -lrb-, which in
lower case is not among the marks dropped, and neither are "?!" and "!!". Not followed: e-mail addresses, emoticons,
telephone numbers and mark-up, which captions hardly have.
"""

from __future__ import annotations

import re

DROPPED = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split()) | {'"'}

_REPLACED = str.maketrans({
    "’": "'", "‘": "`", "“": '"', "”": '"', "…": "...", "–": "--", "—": "--", "\xa0": " ", "\ufe0f": None,
    "£": "#", "€": "$", "¢": " cents ", "½": " 1/2", "¼": " 1/4", "¾": " 3/4",
    "(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- ",
})  # fmt: skip
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&nbsp;": " "}
_ENTITY = re.compile("|".join(_ENTITIES))
_TWO_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me",
              "gimme": "gim me", "'tis": "'t is", "'twas": "'t was"}  # fmt: skip

_KEEP_THEIR_DOT = (
    "mr|mrs|ms|mme|mlle|messrs|msgr|dr|prof|gen|rep|sen|gov|pres|rev|hon|adm|capt|cmdr|col|cpl|lt|maj|pfc|sgt|brig|st|ste|"
    "ft|mt|jr|sr|inc|co|corp|ltd|bros|plc|cie|cos|mfg|univ|assn|dept|bldg|intl|natl|ave|blvd|rd|sq|ct|tel|alex|wm|jos|"
    "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|"
    "ala|ariz|calif|colo|conn|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wis|wyo|"
    "al|cf|est|etc|ext|ph|vs"
)
_TOKEN = re.compile(
    rf"""
      -(?:lrb|rrb|lsb|rsb|lcb|rcb)-
    | n't(?!\w) | '(?:s|d|m|ll|re|ve)(?!\w)                     # do n't, it 's
    | '\d\ds?(?!\w) | '(?:em|cause|til|till|tis|twas)(?!\w) | 'n' | 'n(?!\w)
    | (?:ol|dunkin)'(?!\w) | y'(?=[^\W\d_]) | [cdejlnos]+'[^\W\d_]{{2,}} | ma'am(?!\w)
    | (?:[^\W\d_]\.){{2,}}(?!\w)(?:-[^\W_]+)* | [^\W\d_]\.(?!\w)      # u.s., initials
    | (?:{_KEEP_THEIR_DOT})\.(?!\w)
    | (?:nos?|pp?|art|sec)\.(?=\s*\d)
    | https?://\S*[\w/]
    | (?:(?<![^\s$#])[-+])?\d*(?:[.,:]\d+)+(?:-[^\W_]+)* | (?<![^\s$#])[-+]\d+(?!\w)        # 12:30, 3,000, -5
    | [#@](?=[^\W\d_]) \w+
    | (?:(?!n't(?!\w))[^\W_])+                                  # words, with what holds them together
      (?: (?: [-/_\0] | (?<=[^\W\d_])(?<!\d[^\W\d_])[.!?](?=[^\W\d_]))
          (?:(?!n't(?!\w))[^\W_])+ )*
    | \.{{3,}} | [?!]+ | -+ | \*+ | _+ | \S
    """,
    re.VERBOSE,
)


def tokenize(caption: str) -> list[str]:
    """The words of one caption, in lower case, without the marks in `DROPPED`."""
    text = _ENTITY.sub(lambda found: _ENTITIES[found[0]], caption)
    text = re.sub(r"([A-Z])&(?=[A-Z])", "\\1\0", text)  # AT&T is one word
    words = []
    for token in _TOKEN.findall(text.translate(_REPLACED).lower()):
        if token in ("---", "----") or token.startswith("...."):
            continue  # longer dashes and ellipses are dropped as the short ones are
        if ord(token[-1]) < 0x10000:  # Java's tokenizer skips pictographs
            words += _TWO_WORDS.get(token, token).replace("\0", "&").split(" ")
    return [word for word in words if word not in DROPPED]
