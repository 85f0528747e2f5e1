"""Which word came first? A synthetic task."""

from metajax.data.tasks import task
from metajax.data.tasks.prompts import TEXT_HEAD, WORDS, Example, PromptTask


@task("first_word")
class FirstWord(PromptTask):
    @staticmethod
    def chance(sizes):
        return 1 / len(WORDS)

    def write(self, rng, room):
        question = ("\nQ: first word? A:",)
        words = tuple(self.pick(rng, WORDS, 3))
        cost = self.costs(TEXT_HEAD, *question) + 4 * self.costliest["word"]
        return None if room < cost else Example(((TEXT_HEAD, *words),), question, words[:1])
