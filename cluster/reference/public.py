"""What is public: the names that other people's programs may import, and from where.

A change of what stands here is told in CHANGELOG.md; everything else may move without a word.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublicModule:
    """A module to import from; no names: all that it exports or defines without an underscore."""

    name: str
    names: tuple[str, ...] = ()


PUBLIC: dict[str, tuple[PublicModule, ...]] = {
    "model": (
        PublicModule(name="model"),
        PublicModule(name="model.export", names=("export_graphs", "load_saved")),
    ),
    "memory_server": (
        PublicModule(name="memory_server.api"),
        PublicModule(name="memory_server.local", names=("LocalMemory",)),
        PublicModule(name="memory_server.actors.client", names=("RayMemory",)),
        PublicModule(name="memory_server.store.store", names=("Store",)),
        PublicModule(name="memory_server.store.changes", names=("Addition", "Change", "Plug")),
        PublicModule(name="memory_server.keys.stored_vectors", names=("StoredVectors",)),
        PublicModule(name="memory_server.index.base", names=("IndexSettings",)),
        PublicModule(
            name="memory_server.stats", names=("MemoryStats", "ShardStats", "EpochStats", "Latency")
        ),
        PublicModule(name="memory_server.errors"),
    ),
    "trainer": (
        PublicModule(name="trainer.corpus.build", names=("build_corpus",)),
        PublicModule(name="trainer.corpus.info", names=("CorpusInfo", "load_corpus_info")),
        PublicModule(
            name="trainer.checkpoint",
            names=("latest_checkpoint", "committed_checkpoints", "read_key_weights"),
        ),
        PublicModule(name="trainer.metrics_lines", names=("read_metrics",)),
        PublicModule(name="trainer.report.page", names=("write_report",)),
        PublicModule(name="trainer.convert.bert", names=("MemoryParts", "convert_bert")),
        PublicModule(name="trainer.convert.published", names=("convert_published",)),
        PublicModule(name="trainer.convert.to_published", names=("convert_to_published",)),
        PublicModule(name="trainer.convert.freeze", names=("freeze_vectors",)),
        PublicModule(name="trainer.finetune.run", names=("check", "claim", "finetune")),
    ),
    "cluster": (
        PublicModule(
            name="cluster.config", names=("load_config", "config_from_mapping", "PretrainConfig")
        ),
        PublicModule(name="cluster.pretrain", names=("pretrain",)),
        PublicModule(name="cluster.evaluate", names=("evaluate_model", "memory_usage")),
        PublicModule(name="cluster.trained_model", names=("TrainedModel", "load_trained_model")),
        PublicModule(name="cluster.editing.edits", names=("Editor", "NewDomain")),
        PublicModule(name="cluster.editing.passages", names=("Knowledge",)),
        PublicModule(name="cluster.editing.outcome", names=("Edit",)),
        PublicModule(
            name="cluster.explain.opened", names=("explained_by_store", "explained_by_server")
        ),
        PublicModule(name="cluster.explain.measure", names=("explain",)),
        PublicModule(
            name="cluster.explain.explanation",
            names=(
                "Explanation",
                "Prediction",
                "Guess",
                "LayerReading",
                "EntryRead",
                "EntryText",
                "Without",
            ),
        ),
        PublicModule(
            name="cluster.probes.reading", names=("Columns", "Probe", "read_probes", "fit")
        ),
        PublicModule(name="cluster.probes.scoring", names=("ask", "figures", "Figures")),
        PublicModule(
            name="cluster.probes.updating",
            names=("update_knowledge", "Edits", "Locality", "Update"),
        ),
    ),
}
