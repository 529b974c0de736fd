//! The `rekindle` program: reads its arguments and runs one command.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rekindle::cli::chat::{self, ChatArgs};
use rekindle::cli::pull::{self, PullArgs};

fn main() {}
