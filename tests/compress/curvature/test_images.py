"""Oracle: one image at a time through plain autograd (tests/oracles/curvature.py), wherever the images lie in a layer's input."""

import pytest
import torch
from torch import nn

from compress.curvature import collect, squared_gradients
from compress.errors import UserError
from tests.compress.curvature.nets import randn
from tests.oracles.curvature import ggn_block


class Tokens(nn.Module):
    """Linear layers on sequences [b, T, c]: batch first, sequence first, and flattened in both orders."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        self.order, self.first, self.second, self.head = order, nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        b, t = x.shape[:2]
        x = x if self.order[0] == "b" else x.transpose(0, 1)
        x = x.flatten(0, 1) if self.order.endswith("flat") else x
        x = torch.relu(self.second(torch.tanh(self.first(x))))
        shape = (b, t) if self.order[0] == "b" else (t, b)
        return self.head(x.reshape(*shape, 4).mean(1 if self.order[0] == "b" else 0))


ORDERS = ["batch first", "sequence first", "batch first, flat", "sequence first, flat"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [2, 4, 5])  # fewer than, as many as, and no multiple of the images
def test_gradients_of_linears_on_sequences_belong_to_their_images(order, tokens):
    net, x = Tokens(order), randn(4, tokens, 3)
    squares = squared_gradients(net, [x], fisher="exact")
    factors = collect(net, [x], fisher="exact", ekfac=True)
    for name in ("first", "second", "head"):
        exact, entry = ggn_block(net, name, x), factors[name]
        q_a, q_g = (spectrum.vectors for spectrum in entry.eigen())
        basis = torch.kron(q_g, q_a)
        torch.testing.assert_close(entry.second.flatten(), (basis.T @ exact @ basis).diagonal())
        torch.testing.assert_close(squares[name], exact.diagonal().reshape(squares[name].shape[0], -1)[:, :-1])


@pytest.mark.parametrize("order", ORDERS[1:])
def test_the_order_of_the_rows_does_not_enter(order):
    x = randn(6, 3, 3)
    for options in ({"sharing": "reduce"}, {"ekfac": True}):
        usual, other = (collect(Tokens(kind), [x[:4], x[4:], x[:1]], fisher="exact", **options) for kind in (ORDERS[0], order))
        for name in usual:
            for kind in ("A", "G", "second"):
                if getattr(usual[name], kind) is not None:
                    torch.testing.assert_close(getattr(other[name], kind), getattr(usual[name], kind))


def test_a_sequence_first_encoder_has_the_curvature_of_a_batch_first_one():
    class Encoder(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.head = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first), nn.Linear(4, 3)
            self.double().eval()

        def forward(self, x):
            if self.encoder.self_attn.batch_first:
                return self.head(self.encoder(x).mean(1))
            return self.head(self.encoder(x.transpose(0, 1)).mean(0))

    x, names = randn(4, 8, 4), ["encoder.linear1", "encoder.linear2", "head"]
    squares = squared_gradients(Encoder(False), [x], names, fisher="exact")
    factors = collect(Encoder(False), [x], layers=names, fisher="exact", ekfac=True)
    for name in names:
        exact = ggn_block(Encoder(True), name, x)
        assert factors[name].second.sum().item() == pytest.approx(exact.trace().item(), rel=1e-10)
        torch.testing.assert_close(squares[name], exact.diagonal().reshape(squares[name].shape[0], -1)[:, :-1])


@pytest.mark.parametrize("frames_first", [False, True])
def test_convolutions_sum_over_the_frames_of_an_image(frames_first):
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, (3, 2), stride=2, groups=2), nn.Linear(4, 3)
            self.double()

        def forward(self, x):
            b, k = x.shape[:2]
            rows = (x.transpose(0, 1) if frames_first else x).flatten(0, 1)
            z = torch.relu(self.b(torch.relu(self.a(rows)))).mean((2, 3))
            return self.head(z.view(k, b, -1).mean(0) if frames_first else z.view(b, k, -1).mean(1))

    net, x = Video(), randn(4, 3, 2, 5, 6)
    factors, squares = collect(net, [x], fisher="exact", ekfac=True), squared_gradients(net, [x], fisher="exact")
    for name in ("a", "b"):
        exact = ggn_block(net, name, x)
        assert factors[name].second.sum().item() == pytest.approx(exact.trace().item(), rel=1e-10)
        torch.testing.assert_close(squares[name].flatten(), exact.diagonal().reshape(4, -1)[:, :-1].flatten())
    reduced = collect(net, [x], fisher="exact", sharing="reduce")["a"]
    windows = nn.functional.unfold(x.flatten(0, 1), 3, padding=1).reshape(4, 3, 18, 30).mean((1, 3))
    torch.testing.assert_close(reduced.weight_A, windows.T @ windows / 4)


class Table(nn.Module):
    """A linear layer that reads a table instead of the images, as large as the batch."""

    def __init__(self, rows):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("table", randn(rows, 3))
        self.a, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        return self.head(x + torch.tanh(self.a(self.table)).mean(0))


class Alike(nn.Module):
    """All rows are equal, so that their order cannot be seen."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        rows = self.a(torch.ones(5 * len(x), 3, dtype=torch.float64))
        return self.head(x + torch.relu(rows.view(-1, 5, 4)).mean(1))


@pytest.mark.parametrize("net", [Table(4), Alike()])
def test_rows_that_belong_to_no_one_image_are_refused_in_one_sentence(net):
    x = randn(4, 4)
    assert set(collect(net, [x])) == {"a", "head"}
    for call in (lambda: squared_gradients(net, [x]), lambda: collect(net, [x], ekfac=True), lambda: collect(net, [x], sharing="reduce")):
        with pytest.raises(UserError) as error:
            call()
        assert "layer 'a'" in str(error.value) and "exclude it" in str(error.value) and "\n" not in str(error.value)
    assert squared_gradients(net, [x], ["head"])["head"].shape == (3, 4)
