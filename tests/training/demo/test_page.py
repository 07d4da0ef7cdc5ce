from html.parser import HTMLParser

from stylewright.training.demo.page import Row, write_page

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Pictures, text by element, and whether everything that was opened was closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes)["src"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] != "style":
            self.texts.append((self.open[-1], data.strip()))


def write(path, **changes):
    content = {
        "title": "A title",
        "introduction": "What it shows.",
        "rows": [Row("Before", "style 0.25", "before.png"), Row("After", "style 0.75", "after.png")],
        "plots": ["loss.png"],
        "table": [["", "score"], ["one", "0.1"], ["other", "0.2"]],
    }
    write_page(path, **{**content, **changes})
    return Page(path.read_text(encoding="utf-8"))


def test_a_page_holds_what_it_is_given_in_order(tmp_path):
    page = write(tmp_path / "index.html")
    assert page.open == []
    assert page.images == ["before.png", "after.png", "loss.png"]
    assert [text for tag, text in page.texts if tag in ("b", "span")] == ["Before", "style 0.25", "After", "style 0.75"]
    assert [text for tag, text in page.texts if tag == "th"] == ["score"]
    assert [text for tag, text in page.texts if tag == "td"] == ["one", "0.1", "other", "0.2"]
    assert ("title", "A title") in page.texts and ("h1", "A title") in page.texts
    assert ("p", "What it shows.") in page.texts


def test_text_cannot_become_markup(tmp_path):
    """A free word is spelled <v0>, and a picture's name is the user's."""
    nasty = '<v0> & "<img src=x>"'
    page = write(
        tmp_path / "index.html",
        title=nasty,
        introduction=nasty,
        rows=[Row(nasty, nasty, 'a"b&c.png')],
        table=[[nasty], [nasty]],
    )
    assert page.open == []
    assert page.images == ['a"b&c.png', "loss.png"]
    assert {tag for tag, text in page.texts if text == nasty} == {"title", "h1", "p", "b", "span", "th", "td"}
