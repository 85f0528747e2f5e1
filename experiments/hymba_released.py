"""Hymba (arXiv 2411.13676) and published models of others: tables 2 and 4 to 8, only at paper scale.

Rows that metajax cannot train have only the paper's values and no run.
"""

from dataclasses import replace

from metajax.registry import Column, Published, Row, table

from . import IN_PRINT
from .hymba import CACHE, PAPER
from .hymba_sizes import released

OTHERS = "other people's weights"
ASKED = "Weights of Llama's layout can be asked all the same: `import llama DIR`, then `eval RUN --choice ...` (docs/hymba.md)."


def of_tasks(**paths: str) -> list[Column]:
    return [Column(f"{name.replace('_', ' ')}, %", path, 2, "higher", 100) for name, path in paths.items()]


def stated(columns: list[Column], values: tuple[float | None, ...], note: str = "") -> dict[str, Published]:
    """Values of a row of the paper; None for a dash."""
    return {column.key: Published(value, note) for column, value in zip(columns, values, strict=True)}


def in_print(
    name: str, columns: list[Column], *values: float | None, lacks: str = OTHERS, core: bool = False, **options: str
) -> Row:
    return Row(name, published=stated(columns, values), lacks=lacks, core=core, **options)


SMALL = [
    Column("tokens/s", f"{IN_PRINT}tokens_per_second", 0, "higher"),
    replace(CACHE, part="", digits=0),
    *of_tasks(
        MMLU=f"{IN_PRINT}mmlu",
        **{"ARC-E": "eval.choice.arc_easy.acc", "ARC-C": "eval.choice.arc_challenge.acc"},
        PIQA="eval.choice.piqa.acc",
        WinoGrande="eval.choice.winogrande.acc",
        HellaSwag="eval.choice.hellaswag.acc",
        **{"SQuAD-C": "eval.choice.settings.none_1.squad_completion.acc"},
        mean=f"{IN_PRINT}mean",
    ),
]

table(
    "hymba/small_models",
    summary="Hymba-1.5B beside published models of its size, at paper scale alone",
    paper=f"{PAPER}, tables 2 and 8",
    paper_rows=13,
    rows=[
        in_print("openelm_1.1b", SMALL, 246, 346, 27.06, 62.37, 19.54, 74.76, 61.80, 48.37, 45.38, 48.47),
        in_print("rene_1.3b", SMALL, 800, 113, 32.94, 67.05, 31.06, 76.49, 62.75, 51.16, 48.36, 52.83),
        in_print("phi_1.5", SMALL, 241, 1573, 42.56, 76.18, 44.71, 76.56, 72.85, 48.00, 30.09, 55.85),
        in_print("smollm_1.7b", SMALL, 238, 1573, 27.06, 76.47, 43.43, 75.79, 60.93, 49.58, 45.81, 54.15),
        in_print("cosmo_1.8b", SMALL, 244, 1573, 26.10, 62.42, 32.94, 71.76, 55.80, 42.90, 38.51, 47.20),
        in_print("danube2_1.8b", SMALL, 271, 492, 40.05, 70.66, 33.19, 76.01, 66.93, 53.70, 49.03, 55.65),
        in_print("llama3.2_1b", SMALL, 535, 262, 32.12, 65.53, 31.39, 74.43, 60.69, 47.72, 40.18, 50.29),
        in_print("qwen2.5_1.5b", SMALL, 469, 229, 60.92, 75.51, 41.21, 75.79, 63.38, 50.20, 49.53, 59.51),
        in_print("amd_olmo_1.2b", SMALL, 387, 1049, 26.93, 65.91, 31.57, 74.92, 61.64, 47.30, 33.71, 48.85),
        in_print("smollm2_1.7b", SMALL, 238, 1573, 50.29, 77.78, 44.71, 77.09, 66.38, 53.55, 50.50, 60.04),
        in_print("llama3.2_3b", SMALL, 191, 918, 56.03, 74.54, 42.32, 76.66, 69.85, 55.29, 43.46, 59.74),
        in_print(
            "hymba_all_data",
            SMALL,
            664,
            79,
            51.19,
            76.94,
            45.90,
            77.31,
            66.61,
            53.55,
            55.93,
            61.06,
            lacks="the part of its data that is not public",
        ),
        Row(
            "hymba",
            of="hymba/1.5b_8k",
            published=stated(SMALL, (664, 79, 44.31, 78.58, 47.01, 77.53, 64.56, 53.89, 59.82, 60.81)),
            note="public data alone",
        ),
    ],
    columns=SMALL,
    baseline="hymba",
    minutes={"paper": 37_000},
    notes=[
        "No example before a question, and one before a passage of SQuAD-C; MMLU with five, in a form that metajax does not have: letters of the answers.",
        "Tokens a second on an A100, 8,000 tokens, 128 rows or as many as fit; the mean is of the seven tasks.",
        ASKED,
    ],
)(lambda scale: released("1.5b"))


TINY = of_tasks(
    MMLU=f"{IN_PRINT}mmlu",
    ARC="eval.choice.arc.acc_norm",
    PIQA="eval.choice.piqa.acc_norm",
    HellaSwag="eval.choice.hellaswag.acc_norm",
    OBQA="eval.choice.openbookqa.acc_norm",
    WinoGrande="eval.choice.winogrande.acc_norm",
    mean="eval.choice.average",
)
BELOW_200M, BELOW_400M = {"group": "below 200M parameters"}, {"group": "below 400M parameters, and of 560M and 590M"}

table(
    "hymba/tiny_models",
    summary="Hymba-125M and -350M beside published models of their sizes, at paper scale alone",
    paper=f"{PAPER}, tables 6 and 7",
    paper_rows=19,
    rows=[
        in_print("mamba_130m", TINY, 27.41, 33.01, 63.33, 33.86, 30.40, 51.54, 42.43, **BELOW_200M),
        in_print("cerebras_gpt_111m", TINY, 25.56, 27.75, 58.16, 26.32, 25.40, 50.28, 37.58, **BELOW_200M),
        in_print("gpt_neo_125m", TINY, 27.25, 31.30, 62.35, 29.68, 29.20, 51.54, 40.81, **BELOW_200M),
        in_print("lamini_gpt_124m", TINY, 26.47, 33.26, 62.89, 30.05, 27.80, 50.75, 40.95, **BELOW_200M),
        in_print("opt_125m", TINY, 25.67, 31.25, 61.97, 31.04, 29.00, 53.20, 41.29, **BELOW_200M),
        in_print("gpt2_137m", TINY, 26.29, 31.09, 62.51, 29.76, 29.40, 49.72, 40.50, **BELOW_200M),
        in_print("pythia_160m", TINY, 26.68, 31.92, 61.64, 29.55, 27.80, 49.49, 40.08, **BELOW_200M),
        in_print("mobilelm_125m", TINY, None, 35.51, 65.30, 38.90, 39.50, 53.10, 46.46, **BELOW_200M),
        in_print("smollm_135m", TINY, 30.23, 43.99, 69.60, 42.30, 33.60, 52.70, 48.44, **BELOW_200M),
        Row(
            "hymba_125m", of="hymba/125m", published=stated(TINY, (31.12, 44.95, 68.50, 45.54, 35.52, 52.25, 49.35)), **BELOW_200M
        ),
        in_print("bloom_560m", TINY, 27.49, 32.86, 65.13, 35.98, 28.80, 51.70, 42.89, **BELOW_400M),
        in_print("cerebras_gpt_256m", TINY, 25.91, 29.69, 61.37, 28.44, 28.00, 51.62, 39.82, **BELOW_400M),
        in_print("cerebras_gpt_590m", TINY, 26.93, 32.40, 62.84, 31.99, 28.40, 50.12, 41.15, **BELOW_400M),
        in_print("opt_350m", TINY, 26.57, 31.94, 64.36, 36.09, 27.80, 52.57, 42.55, **BELOW_400M),
        in_print("pythia_410m", TINY, 28.94, 35.05, 66.92, 39.21, 28.40, 52.80, 44.48, **BELOW_400M),
        in_print("gpt2_medium_380m", TINY, 27.77, 34.30, 66.38, 37.06, 31.20, 49.49, 43.69, **BELOW_400M),
        in_print("mobilelm_350m", TINY, None, 43.65, 68.60, 49.60, 40.00, 57.60, 51.89, **BELOW_400M),
        in_print("smollm_360m", TINY, 34.17, 51.10, 72.00, 53.80, 37.20, 53.70, 53.56, **BELOW_400M),
        Row(
            "hymba_350m", of="hymba/350m", published=stated(TINY, (34.54, 52.46, 72.91, 55.08, 38.40, 57.85, 55.34)), **BELOW_400M
        ),
    ],
    columns=TINY,
    baseline=None,
    minutes={"paper": 37_000},
    notes=[
        "The paper's are LightEval's, its mean that of all columns but MMLU; ours are the harness' by the length of the answers (acc_norm, an inference), our mean that of "
        "the likeliest answers (acc). ARC is both of its sets. Hymba is trained here on the public part of the paper's data.",
        ASKED,
    ],
)(lambda scale: released("125m"))


TUNED = of_tasks(**{name: f"{IN_PRINT}{name.lower()}" for name in ("MMLU", "IFEval", "GSM8K", "GPQA", "BFCLv2", "mean")})
ROLES = of_tasks(new_instructions=f"{IN_PRINT}instructions", new_roles=f"{IN_PRINT}roles")
INSTRUCTIONS, ROLE_PLAY = {"group": "instructions (table 4)"}, {"group": "role play (table 5)"}
UNSCORED = {"lacks": "a score of answers written freely, and its data", "core": True}
UNADAPTED = {"lacks": "low-rank adaptation, and a score of answers written freely", "core": True}

table(
    "hymba/instructed",
    summary="models tuned on instructions and on roles: what the paper prints, for metajax does not score answers written freely",
    paper=f"{PAPER}, tables 4 and 5",
    paper_rows=12,
    rows=[
        in_print("smollm_1.7b", TUNED, 27.80, 25.16, 1.36, 25.67, None, 20.00, **INSTRUCTIONS, note="cannot call functions"),
        in_print(
            "openelm_1.1b",
            TUNED,
            25.65,
            6.25,
            56.03,
            21.62,
            None,
            27.39,
            **INSTRUCTIONS,
            note="cannot call functions; its GSM8K is Qwen2.5's, as printed",
        ),
        in_print("llama3.2_1b", TUNED, 44.41, 58.92, 42.99, 24.11, 20.27, 38.14, **INSTRUCTIONS),
        in_print("qwen2.5_1.5b", TUNED, 59.73, 46.78, 56.03, 30.13, 43.85, 47.30, **INSTRUCTIONS),
        in_print("smollm2_1.7b", TUNED, 49.11, 55.06, 47.68, 29.24, 22.83, 40.78, **INSTRUCTIONS),
        in_print("hymba_1.5b", TUNED, 52.79, 57.14, 58.76, 31.03, 46.40, 49.22, **INSTRUCTIONS, **UNSCORED),
        in_print("llama_7b", ROLES, 19.2, 19.3, **ROLE_PLAY),
        in_print("alpaca_7b", ROLES, 25.6, 24.5, **ROLE_PLAY),
        in_print("vicuna_13b", ROLES, 25.0, 24.3, **ROLE_PLAY),
        in_print("llama2_7b_chat", ROLES, 18.8, 20.5, **ROLE_PLAY),
        in_print("role_llama_7b", ROLES, 35.5, 33.5, **ROLE_PLAY),
        in_print("hymba_dora", ROLES, 40.0, 37.9, **ROLE_PLAY, **UNADAPTED),
    ],
    columns=[*TUNED, *ROLES],
    baseline=None,
    minutes={"paper": 0},
    notes=[
        "Full fine-tuning on instructions and learning from preferences are there (docs/weights.md); their rates in the paper are 5e-5 and 3e-6, in rows of 8,192.",
    ],
)(lambda scale: released("1.5b"))
