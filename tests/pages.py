"""report.html as tests read it."""
from html.parser import HTMLParser


class Page(HTMLParser):
    """Sections, tables (text and value of each cell), images and checks of a page."""

    def __init__(self, path):
        super().__init__()
        self.text, self.titles, self.tables, self.images, self.checks = '', [], {}, [], []
        self.scripts = []
        self._tag = self._table = None
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self._tag = tag
        if tag == 'table':
            self._table = self.tables.setdefault(attributes['id'], [])
        elif tag == 'tr':
            self._row = []
        elif tag == 'td':
            self._row.append(['', attributes.get('data-v')])
        elif tag == 'img':
            self.images.append(attributes['src'])
        elif tag in ('script', 'link'):
            self.scripts.append(attributes)
        if 'data-check' in attributes:
            self.checks.append(attributes['data-check'])

    def handle_endtag(self, tag):
        if tag == 'tr' and self._row:
            self._table.append(self._row)
        self._tag = None

    def handle_data(self, data):
        self.text += data
        if self._tag == 'td':
            self._row[-1][0] += data
        elif self._tag == 'h2':
            self.titles.append(data)

    def column(self, table, index):
        """Values of a column, as numbers; None where not known."""
        return [float(row[index][1]) if row[index][1] else None for row in self.tables[table]]
