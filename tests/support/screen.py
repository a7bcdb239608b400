"""A terminal that obeys what it is sent; a sequence that it does not know is an error."""

import io
import re


class Screen(io.StringIO):
    """A stream that keeps what a terminal would show of it."""

    def __init__(self):
        super().__init__()
        self.rows, self.row, self.column = [""], 0, 0
        self.has_cursor = True

    def isatty(self):
        return True

    def lines(self):
        """Return the lines that are not empty, without spaces at their ends."""
        return [row.rstrip() for row in self.rows if row.strip()]

    def highlighted(self):
        """Return what the last frame shows in bold."""
        return "".join(re.findall(r"\x1b\[1;32m([^\x1b]*)\x1b\[0m", self.getvalue().rpartition("\x1b[2K")[2]))

    def write(self, text):
        for code, char in re.findall(r"\x1b\[([?0-9;]*[A-Za-z])|(.)", text, re.S):
            if code in ("?25l", "?25h"):
                self.has_cursor = code == "?25h"
            elif code == "2K":
                self.rows[self.row] = ""
            elif code.endswith("A"):
                self.row -= int(code[:-1])
                assert self.row >= 0, "moved up past the top"
            elif code:
                assert code.endswith("m"), f"unexpected escape sequence {code!r}"
            elif char == "\r":
                self.column = 0
            elif char == "\n":
                self.row, self.column = self.row + 1, 0
                self.rows += [""] * (self.row + 1 - len(self.rows))
            else:
                assert char.isprintable(), f"control character {char!r}"
                self.rows[self.row] = self.rows[self.row][: self.column] + char
                self.column += 1
        return super().write(text)
