"""Sentences that count, a source."""

import hashlib

from metajax.data.documents import Document, Source
from metajax.data.sources import source


@source("counting")
class Counting(Source):
    def __init__(self, request):
        self.spec, self.count = request.spec, int(request.path)

    def __len__(self):
        return self.count

    def read(self, records):
        for n in records:
            yield Document(" ".join(map(str, range(n, n + 12))), {"parity": "odd" if n % 2 else "even"}, str(n))

    def fingerprint(self):
        return hashlib.sha256(str(self.count).encode()).hexdigest()
