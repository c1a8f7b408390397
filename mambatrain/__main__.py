from mambatrain.cli import main

main()
