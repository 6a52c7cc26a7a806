//! kube-lane at work on this machine, in less than a minute: `cargo xtask demo`.
//!
//! Two nodes, four pods and an outside client in network namespaces; an agent on each node; Services from a manifest
//! folder, or from a real API server. Every answer is one that a real client got over a real connection, and an answer
//! that should not have come, or did not come, ends the demo with an error. Owns the play's order.

mod board;
mod probe;
mod screen;
mod stage;
mod store;

use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use kube_lane_lab::{Lab, Outcome};
use kube_lane_tests::{agent, controlplane};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use self::board::Board;
use self::probe::{Probes, Target};
use self::screen::{Ink, Screen, millis};
use self::stage::{LEAVER, Stage, WEB};
use self::store::{Store, Written};

/// How long anything may take that is a matter of milliseconds.
const LIMIT: Duration = Duration::from_secs(10);
/// How long a picture stands on a terminal before the next thing happens.
const LOOK: Duration = Duration::from_secs(3);
/// A refusal that takes longer is none at once: a client that hears nothing tries again after a second.
const AT_ONCE: Duration = Duration::from_millis(500);

/// kube-lane at work: nodes, pods and clients in network namespaces of this machine.
#[derive(Parser)]
#[command(bin_name = "cargo xtask demo")]
struct Args {
    /// Take the Services from a real etcd and kube-apiserver, not from a manifest folder
    #[arg(long)]
    api: bool,
    /// Answer at the sockets what can be answered there (eBPF), and show what was
    #[arg(long)]
    ebpf: bool,
    /// Leave everything running until Ctrl-C, to look around
    #[arg(long)]
    keep: bool,
}

/// The play was ended by a signal.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
struct Interrupted;

fn main() -> ExitCode {
    let args = Args::parse();
    let mut screen = Screen::new();
    let outcome = watch_for_signals().and_then(|interrupted| play(&args, &mut screen, interrupted));
    screen.release_table();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Interrupted>() => {
            screen.say("  interrupted; everything is removed");
            ExitCode::from(130)
        }
        Err(error) => {
            let mark = screen.paint(Ink::Red, "✗");
            screen.say(format!("  {mark} {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// A flag that the first signal sets; a second one ends the process at once (the next lab sweeps what it leaves).
fn watch_for_signals() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        flag::register_conditional_shutdown(signal, 130, Arc::clone(&interrupted))?;
        flag::register(signal, Arc::clone(&interrupted))?;
    }
    Ok(interrupted)
}

/// The whole play; whatever its outcome, nothing of it is left.
fn play(args: &Args, screen: &mut Screen, interrupted: Arc<AtomicBool>) -> Result<()> {
    let begun = Instant::now();
    let from = if args.api { "a real API server" } else { "a manifest folder" };
    let title = screen.paint(Ink::Bold, "kube-lane");
    let layers = if args.ebpf { "nftables and eBPF" } else { "nftables" };
    screen.say(format!(
        "\n  {title}  Services from {from}, programmed into {layers}, dialled by real clients\n"
    ));

    let outcome = set_up(args, screen).and_then(|stage| {
        let mut play = Play { stage, screen, ebpf: args.ebpf, interrupted: Arc::clone(&interrupted), begun };
        let outcome = play.acts(args.keep);
        if outcome.is_err() && !play.interrupted.load(Ordering::Relaxed) {
            play.screen.release_table();
            play.stage.logs().lines().for_each(|line| play.screen.note(line));
        }
        outcome
    });
    // The children got the signal, too: what they did then is no news.
    if outcome.is_err() && interrupted.load(Ordering::Relaxed) { Err(Interrupted.into()) } else { outcome }
}

/// Builds the lab, the store and what runs before any Service is known.
fn set_up(args: &Args, screen: &mut Screen) -> Result<Stage> {
    let step = Instant::now();
    let lab = Lab::builder().nodes(2).build()?;
    screen.done("two nodes and an outside client: network namespaces, a cgroup each", step.elapsed());

    let step = Instant::now();
    let store = if args.api { Store::api(lab)? } else { Store::folder(lab)? };
    if args.api {
        screen.done("etcd and kube-apiserver answer on the outside host", step.elapsed());
    }

    let step = Instant::now();
    let mut stage = Stage::build(store)?;
    screen.done("four pods that say who they are: a and b on node0, c and d on node1", step.elapsed());

    let step = Instant::now();
    stage.put_nodes()?;
    stage.start_agents(args.ebpf)?;
    screen.done("a kube-lane agent on each node: started, synced, healthy", step.elapsed());
    Ok(stage)
}

struct Play<'a> {
    stage: Stage,
    screen: &'a mut Screen,
    ebpf: bool,
    interrupted: Arc<AtomicBool>,
    begun: Instant,
}

impl Play<'_> {
    fn acts(&mut self, keep: bool) -> Result<()> {
        self.create()?;
        self.refuse()?;
        self.hairpin()?;

        let targets: Arc<[Target]> = stage::targets(self.stage.lab()).into();
        let hosts = self.stage.clients()?;
        let names = hosts.iter().map(|host| host.name().to_owned()).collect();
        let mut board = Board::new(names, Arc::clone(&targets));
        let probes = Probes::start(hosts, &targets)?;

        self.answer(&mut board, &probes)?;
        self.leave(&mut board, &probes)?;
        self.come_back(&mut board, &probes)?;
        self.screen.release_table();

        self.show_kernel()?;
        self.show_status()?;
        self.screen.say(format!(
            "\n  {} connections in all, and each was answered by a pod that should; {} from start to end\n",
            board.connections(),
            millis(self.begun.elapsed())
        ));
        self.look_around(keep)?;
        if keep {
            while !self.interrupted.load(Ordering::Relaxed) {
                if let Some(sample) = probes.next(Duration::from_millis(100)) {
                    // What the onlooker does to the Services may take any answer away: the table shows it.
                    let _ = board.add(&sample, None);
                }
                self.screen.draw(|screen| board.table(screen));
            }
            self.screen.release_table();
            self.screen.say("  Leaving: everything is removed.");
        }
        Ok(())
    }

    /// The Services appear, and a client in a pod gets its first answer.
    fn create(&mut self) -> Result<()> {
        let answer = self.stage.await_first_answer(LIMIT)?;
        let written = self.stage.put_services()?;
        let answered = answer.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
        let answered = answered.with_context(|| format!("web is not answered within {LIMIT:?}"))?;
        let text = match &self.stage.store {
            Store::Folder { .. } => "Services written to the folder → pod-d has its first answer from web",
            Store::Api(_) => "Services and slices sent to the API → pod-d has its first answer from web",
        };
        self.changed(text, written, answered);
        match &self.stage.store {
            Store::Folder { folder, .. } => {
                let path = folder.arg();
                self.screen.note(&path);
            }
            Store::Api(cluster) => {
                for kind in ["services", "endpointslices"] {
                    let table = cluster.kubectl(&["get", kind])?;
                    self.screen.note(&format!("$ kubectl get {kind}"));
                    table.lines().for_each(|line| self.screen.note(&clipped(line)));
                }
            }
        }
        Ok(())
    }

    /// The Service without endpoints refuses at once, from everywhere.
    fn refuse(&mut self) -> Result<()> {
        let mut slowest = Duration::ZERO;
        for host in self.stage.clients()? {
            for (outcome, took) in self.stage.dial_empty(&host)? {
                let name = host.name();
                ensure!(outcome == Outcome::Refused, "empty, dialled by {name}: {outcome}, not refused");
                ensure!(took < AT_ONCE, "empty, dialled by {name}: refused only after {}", millis(took));
                slowest = slowest.max(took);
            }
        }
        self.screen.done("empty, a Service without endpoints: refused at once (slowest of 6)", slowest);
        Ok(())
    }

    /// A pod reaches itself through its Service.
    fn hairpin(&mut self) -> Result<()> {
        let begun = Instant::now();
        let outcomes = self.stage.dial_self()?;
        let took = begun.elapsed() / 2;
        let mut seen = Vec::new();
        for outcome in outcomes {
            ensure!(outcome.by() == Some("pod-a"), "self, dialled by pod-a, its only endpoint: {outcome}");
            seen.extend(outcome.seen().map(|seen| seen.ip()));
        }
        let pod = self.stage.address("pod-a")?;
        // A socket that is led to itself keeps its address, which is a difference to kube-proxy that is documented.
        ensure!(self.ebpf || !seen.contains(&pod), "self: pod-a saw its own address {pod}");
        self.screen.done("self, dialled by its only endpoint: answered by itself (hairpin)", took);
        Ok(())
    }

    /// Every client meets every pod, through every address.
    fn answer(&mut self, board: &mut Board, probes: &Probes) -> Result<()> {
        let begun = Instant::now();
        board.expect(WEB);
        self.follow(board, probes, None, Board::is_complete)?;
        let took = begun.elapsed();
        self.screen.done("web: pod, node and outside met all of its pods through all of its addresses", took);
        ensure!(board.has_sockets() == self.ebpf, "who was led at the socket: {}", self.table(board));
        self.show(board, probes)
    }

    /// A pod's endpoint goes, then the pod.
    fn leave(&mut self, board: &mut Board, probes: &Probes) -> Result<()> {
        let rest: Vec<_> = WEB.into_iter().filter(|pod| *pod != LEAVER).collect();
        board.expect(rest.iter().copied());
        probes.hurry(true);
        let written = self.stage.put_web(&rest)?;
        self.follow(board, probes, Some(LEAVER), |board| board.departed().is_some())?;
        probes.hurry(false);
        let departed = board.departed().context("nobody left")?;
        let what = self.endpoint_of(LEAVER);
        self.changed(&format!("{what} removed → no client meets it any more"), written, departed);

        self.stage.end_pod(LEAVER);
        board.expect(rest.iter().copied());
        self.follow(board, probes, None, Board::is_complete)?;
        self.screen.note(&format!("{LEAVER} has ended; not one connection went to it since"));
        self.show(board, probes)
    }

    /// The pod comes back, with another address.
    fn come_back(&mut self, board: &mut Board, probes: &Probes) -> Result<()> {
        let former_rest = WEB.into_iter().filter(|pod| *pod != LEAVER);
        self.stage.start_pod(LEAVER, 1)?;
        board.expect(former_rest);
        probes.hurry(true);
        let written = self.stage.put_web(&WEB)?;
        let mut met = None;
        self.follow_samples(board, probes, Some(LEAVER), |_, sample| {
            if met.is_none() && sample.outcome.by() == Some(LEAVER) {
                met = Some(sample.ended);
            }
            met.is_some()
        })?;
        probes.hurry(false);
        let met = met.context("nobody came back")?;
        let address = self.stage.address(LEAVER)?;
        let what = self.endpoint_of(LEAVER);
        self.changed(&format!("{what} added, now at {address} → the first client meets it"), written, met);

        board.expect(WEB);
        self.follow(board, probes, None, Board::is_complete)?;
        self.show(board, probes)
    }

    /// Says how long it took from the beginning of a write until its effect.
    fn changed(&mut self, text: &str, Written { begun, ended }: Written, effect: Instant) {
        self.screen.done(text, effect.saturating_duration_since(begun));
        if let Store::Api(_) = self.stage.store {
            let answer = millis(ended.saturating_duration_since(begun));
            self.screen.note(&format!("the API server's own answer to the writer took {answer}"));
        }
    }

    /// How a change of an endpoint reads.
    fn endpoint_of(&self, pod: &str) -> String {
        match self.stage.store {
            Store::Folder { .. } => format!("{pod}'s endpoint in the folder"),
            Store::Api(_) => format!("{pod}'s endpoint in the API"),
        }
    }

    /// The table as it stands: for a while where it is live, once where it is not.
    fn show(&mut self, board: &mut Board, probes: &Probes) -> Result<()> {
        if self.screen.is_live() {
            let until = Instant::now() + LOOK;
            self.follow(board, probes, None, |_| Instant::now() >= until)
        } else {
            self.screen.place(|screen| board.table(screen));
            Ok(())
        }
    }

    /// Takes connections in until something holds.
    fn follow(
        &mut self,
        board: &mut Board,
        probes: &Probes,
        leaving: Option<&str>,
        until: impl Fn(&Board) -> bool,
    ) -> Result<()> {
        self.follow_samples(board, probes, leaving, |board, _| until(board))
    }

    fn follow_samples(
        &mut self,
        board: &mut Board,
        probes: &Probes,
        leaving: Option<&str>,
        mut until: impl FnMut(&Board, &probe::Sample) -> bool,
    ) -> Result<()> {
        let since = Instant::now();
        loop {
            if self.interrupted.load(Ordering::Relaxed) {
                return Err(Interrupted.into());
            }
            if since.elapsed() > LIMIT {
                bail!("within {LIMIT:?} the clients did not meet what they should:{}", self.table(board));
            }
            let Some(sample) = probes.next(Duration::from_millis(100)) else { continue };
            // What was begun before the last change may have met what was there then.
            board.add(&sample, leaving)?;
            self.screen.draw(|screen| board.table(screen));
            if until(board, &sample) {
                return Ok(());
            }
        }
    }

    fn table(&self, board: &Board) -> String {
        format!("\n{}", board.table(self.screen).join("\n"))
    }

    /// What node0's kernel holds for one address of `web`.
    fn show_kernel(&mut self) -> Result<()> {
        let netns = self.stage.lab().node(0).netns();
        let command = format!("ip netns exec {netns} nft list map ip kube-lane endpoints");
        let mut words = command.split(' ');
        let output = Command::new(words.next().unwrap_or_default()).args(words).output();
        let output = output.context("cannot start ip")?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{command}: {error}");
        self.screen.say(format!(
            "  What the kernel holds for web, IPv4, TCP, on node0: no rule, three elements\n  $ {command}"
        ));
        let listing = String::from_utf8_lossy(&output.stdout);
        let elements = listing.split([',', '{', '}']).map(str::trim);
        for element in elements.filter(|element| element.contains("10.96.0.80 . tcp . 80")) {
            self.screen.note(&clipped(element));
        }
        Ok(())
    }

    /// What the agent of node0 says of `web`.
    fn show_status(&mut self) -> Result<()> {
        let mut status = Command::new(agent::binary()?);
        status.args(["status", "default/web"]);
        let output = self.stage.lab().node(0).run(move || status.output())??;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kube-lane status: {error}");
        self.screen
            .say("\n  Which layer answers at web's addresses, on node0\n  $ kube-lane status default/web");
        let status = String::from_utf8_lossy(&output.stdout).into_owned();
        status.lines().for_each(|line| self.screen.note(&clipped(line)));
        Ok(())
    }

    /// Commands that work while the demo runs.
    fn look_around(&mut self, keep: bool) -> Result<()> {
        if !keep {
            self.screen
                .say("  Look around yourself: cargo xtask demo --keep (or --api --keep, with kubectl)\n");
            return Ok(());
        }
        let node = self.stage.lab().node(0).netns().to_owned();
        let pod = self.stage.netns("pod-d")?.to_owned();
        let outside = self.stage.lab().outside().netns().to_owned();
        let logs: Vec<_> = self.stage.lab().nodes().iter().map(|node| self.stage.store.log(node)).collect();
        let mut commands = vec![
            (
                "the endpoints of every Service on node0",
                format!("ip netns exec {node} nft list map ip kube-lane endpoints"),
            ),
            ("all rules and elements, IPv6", format!("ip netns exec {node} nft list table ip6 kube-lane")),
            ("the connections that node0 translates", format!("ip netns exec {node} conntrack -L")),
            (
                "a connection of your own, from pod-d",
                format!(
                    "ip netns exec {pod} bash -c 'exec 3<>/dev/tcp/10.96.0.80/80; echo hello >&3; head -1 <&3'"
                ),
            ),
            ("the agents' logs", format!("tail {}", logs.join(" "))),
        ];
        match &self.stage.store {
            Store::Folder { folder, .. } => {
                let path = folder.arg();
                let [file, off] = ["web-endpoints.json", "off"].map(|name| format!("{path}/{name}"));
                commands.push(("take web's endpoints away, and give them back", format!("mv {file} {off}")));
                commands.push(("", format!("mv {off} {file}")));
            }
            Store::Api(cluster) => {
                let kubeconfig = cluster.control_plane().admin_kubeconfig();
                let kubectl = controlplane::program("kubectl")?.canonicalize()?;
                let (kubectl, kubeconfig) = (kubectl.display(), kubeconfig.display());
                let run = format!("ip netns exec {outside} {kubectl} --kubeconfig {kubeconfig}");
                commands.push(("the API server", format!("{run} get services,endpointslices")));
                commands
                    .push(("take web's IPv4 endpoints away", format!("{run} delete endpointslice web-v4")));
            }
        }
        for (what, command) in commands {
            if !what.is_empty() {
                let what = self.screen.paint(Ink::Dim, format!("# {what}"));
                self.screen.say(format!("  {what}"));
            }
            self.screen.say(format!("  {command}"));
        }
        self.screen.say("\n  Everything runs until Ctrl-C, and is removed then.");
        Ok(())
    }
}

/// A line that fits under the others.
fn clipped(line: &str) -> String {
    const WIDTH: usize = 96;
    match line.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}
