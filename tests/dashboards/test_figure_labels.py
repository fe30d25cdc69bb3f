"""Figures are listed by what they show, the most informative first, and none is missing from the list."""

import pytest

from workbench.dashboards.figure_labels import figure_names, label


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("routing_analysis_vs_final_matched", "Routing: analysis vs. final, at equal position"),
        ("sinks_low_vs_high_in_final_naive", "Sinks: final, low vs. high effort, within prompts"),
        ("difference_analysis_vs_final", "Difference in expert load: analysis vs. final"),
        ("halves_of_analysis_volcano", "First vs. second half of analysis, volcano plot"),
        ("mass_analysis_high", "Sink attention: analysis, high effort"),
        ("special_in_task", "Specialization by task"),
        ("routing_sizes", "Routing: size by layer"),
        ("experts_pooled", "Unpaired, all tokens pooled"),
        ("recall_recall", "Recall"),
        ("probes_auc", "Probes AUC"),
        ("position", "Position"),
        ("routing_in_frame_naive", "Routing: frame, within prompts"),
        ("agreement_agreement_margin", "Agreement by margin"),
        ("overrepresented_tokens", "Over-represented tokens"),
    ],
)
def test_a_label_is_in_words(name: str, text: str) -> None:
    assert label(name) == text


def test_every_figure_is_in_the_list_once_and_findings_come_first() -> None:
    names = ["load_frame_low", "a_naive", "sizes", "routing_analysis_vs_final_matched", "recall_recall", "recall"]
    labels = figure_names(names)
    assert sorted(labels.values()) == sorted(names)
    assert next(iter(labels.values())) == "routing_analysis_vs_final_matched"
    assert list(labels.values())[-2:] == ["load_frame_low", "a_naive"]
    assert len({label(name) for name in names}) < len(names), "negative control: by label alone one would be lost"
