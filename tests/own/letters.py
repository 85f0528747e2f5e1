"""Letters.

How many distinct tokens the prompts have.
"""

from metajax.analysis import analysis
from metajax.reporting.panels import panels


@analysis("letters", title="Letters of the prompts", fits=lambda study: True)
def letters(study):
    return {"distinct": len(set(study.rows["tokens"].ravel().tolist())), "details": {"lengths": [1.0, 3.0, 2.0]}}


@letters.headlines
def headlines(numbers):
    return [f"{numbers['distinct']} distinct tokens"]


@letters.figures
def figures(result):
    figure, (axes,) = panels(1, 1, 2.0)
    axes.plot(result["details"]["lengths"])
    return [(figure, "Lengths.")]
