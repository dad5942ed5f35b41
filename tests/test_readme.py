"""README.md: its code runs, and the messages that it explains are those of the program."""

import re
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 12
    exec(code.replace('"124M"', '"shakespeare"'), {})  # which is not there to be loaded
    first, rest = capsys.readouterr().out.split("\n", 1)
    assert first and len(rest) > 40


def test_every_message_that_is_explained_is_one_of_the_program():
    rows = re.findall(
        r"^\| (.*?) \| .* \|$", README.split("| it says | do |")[1].split("\n## ")[0], re.MULTILINE
    )
    source = "".join(path.read_text(encoding="utf-8") for path in CHECKOUT.glob("picogpt/*.py"))
    said = re.sub(r'"\n\s*f?"', "", source).replace("\\", "")  # strings that go on in the next line
    assert len(rows) > 10
    for row in rows:
        if "Name or service not known" in row:  # the system's words
            row = "; trying again in … s"
        for part in re.split("…|: ", row.replace("`picogpt.info`: ", "")):
            assert part.strip() in said, part


def test_every_file_that_is_linked_is_there():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert len(links) > 10
    assert [link for link in links if not (CHECKOUT / link).exists()] == []
