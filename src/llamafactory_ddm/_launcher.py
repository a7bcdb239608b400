"""What torchrun's children run in place of LLaMA-Factory's launcher when PyTorch's autoload is off."""

if __name__ == "__main__":
    from llamafactory_ddm._autoload import activate

    activate()
    from llamafactory.train.tuner import run_exp

    run_exp()
