"""Signed numbers at the pointer: one that rounds to zero has no sign, and the numbers that are drawn stay."""

import numpy as np
import plotly.graph_objects as go

from workbench.figures.hover import signed_texts, write_signed_numbers


def hover_texts(figure: go.Figure) -> list[str]:
    """What plotly writes at the points of the first trace, of fields that have no format."""
    trace, texts = figure.data[0], []
    for row in trace.customdata:
        text = trace.hovertemplate
        for number, value in enumerate(row):
            text = text.replace(f"%{{customdata[{number}]}}", str(value))
        texts.append(text)
    return texts


def test_a_number_that_rounds_to_zero_has_no_sign() -> None:
    x, detail = np.array([-0.001, 0.004, -1.5, np.nan]), np.array([[1.0, -0.04], [2.0, 0.2], [3.0, -0.06], [4.0, 0]])
    template = "%{x:+.2f} points, layer %{customdata[0]}, %{customdata[1]:+.1f} nats<extra></extra>"
    figure = go.Figure(go.Scatter(x=x, y=[0, 1, 2, 3], customdata=detail, hovertemplate=template))
    assert ":+" in figure.data[0].hovertemplate, "negative control: plotly writes -0.00 with this format"
    write_signed_numbers(figure)
    assert hover_texts(figure) == [
        "0.00 points, layer 1.0, 0.0 nats<extra></extra>",
        "0.00 points, layer 2.0, +0.2 nats<extra></extra>",
        "-1.50 points, layer 3.0, -0.1 nats<extra></extra>",
        "– points, layer 4.0, 0.0 nats<extra></extra>",
    ]
    assert figure.data[0].x.tolist()[:3] == x.tolist()[:3], "the points stay where they are"
    np.testing.assert_array_equal(figure.data[0].customdata[:, :2].astype(float), detail)


def test_significant_digits_are_written_as_they_are() -> None:
    assert signed_texts(np.array([-0.00012, 0.0, 1234.5]), 3, "g").tolist() == ["-0.00012", "0", "+1.23e+03"]
    heatmap = signed_texts(np.array([[-0.0, 1.0], [-0.001, -0.006]]), 2)
    assert heatmap.tolist() == [["0.00", "+1.00"], ["0.00", "-0.01"]]
