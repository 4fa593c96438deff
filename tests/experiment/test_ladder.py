from gqa_scaling.experiment.ladder import (
    FIGURE_2_LADDER,
    INTERPOLATION_LADDER,
    PUBLISHED_LADDER,
    TRAINED_SIZES,
)


def test_published_sizes():
    assert [(s.name, s.n_layers, s.d_model, s.learning_rate) for s in TRAINED_SIZES] == [
        ("3M", 4, 256, 1e-3),
        ("19M", 6, 512, 1e-3),
        ("85M", 12, 768, 1e-3),
        ("150M", 12, 1024, 1e-3),
        ("200M", 16, 1024, 5e-4),
        ("470M", 24, 1280, 5e-4),
        ("680M", 24, 1536, 2e-4),
        ("1.2B", 36, 1536, 2e-4),
    ]
    assert INTERPOLATION_LADDER == (
        (36, 2048),
        (48, 2560),
        (54, 3072),
        (64, 4096),
        (72, 6144),
        (80, 8192),
    )
    assert PUBLISHED_LADDER[7:9] == ((36, 1536), (36, 2048))
    assert len(PUBLISHED_LADDER) == 14
    assert FIGURE_2_LADDER[0] == (12, 768)
    assert FIGURE_2_LADDER[-1] == (32, 2048)
