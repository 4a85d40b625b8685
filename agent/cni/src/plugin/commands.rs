//! The commands, one function each.

use std::{
    fs::File,
    io::Write,
    os::fd::AsFd as _,
    thread,
    time::{Duration, Instant},
};

use super::{
    Code, Config, Failure, Previous, Subject, Variables,
    agent::{NoAnswer, ask},
    environment::{self, pod},
};
use crate::{
    conflist::SpecVersion,
    projection::{Projection, Treatment},
    protocol::{Answer, Attachment, Command, PodName, Removal},
};

/// How long `ADD` waits for an answer. A kubelet gives a sandbox four minutes, and the agent needs milliseconds.
const ADD_LIMIT: Duration = Duration::from_secs(20);
/// How long `ADD` waits for an agent that does not run, such as one that is being restarted.
const ABSENT_LIMIT: Duration = Duration::from_secs(3);
/// How often it looks for one meanwhile.
const RETRY: Duration = Duration::from_millis(50);
/// How long the others wait.
const CHECK_LIMIT: Duration = Duration::from_secs(5);
const DEL_LIMIT: Duration = Duration::from_secs(2);

/// Has the pod captured, and hands on the previous plugin's result.
pub(super) fn add(config: &Config, variables: &impl Variables, stderr: &mut impl Write) -> Result<String, Failure> {
    let subject = Subject::read(variables)?;
    let previous = config.previous()?;
    let result = serde_json::to_string(&previous).expect("it was JSON before");
    let Some(pod) = concerned(config, &subject) else { return Ok(result) };
    let netns = netns(&subject)?;
    let command = Command::Add(attachment(&subject, pod, &previous));
    let end = Instant::now() + ADD_LIMIT;
    let mut absent_until = None;
    loop {
        let limit = end.saturating_duration_since(Instant::now());
        let reason = match ask(&config.socket, command.clone(), Some(netns.as_fd()), limit) {
            Ok(answer) => return accepted(answer, pod).map(|()| result),
            Err(reason) => reason,
        };
        let NoAnswer::Absent(_) = reason else { return Err(unanswered(pod, &reason)) };
        let verdict = without_agent(config, pod);
        if let Verdict::Free = verdict {
            let _ =
                writeln!(stderr, "underpass-cni: {} passes: {reason}, and its namespace is not in the mesh", told(pod));
            return Ok(result);
        }
        let until = *absent_until.get_or_insert_with(|| Instant::now() + ABSENT_LIMIT);
        // Nothing tells of a socket that will be listened on.
        if Instant::now() + RETRY >= until.min(end) {
            return Err(held(pod, &reason, &verdict));
        }
        thread::sleep(RETRY);
    }
}

/// Asks whether the pod is captured.
pub(super) fn check(config: &Config, variables: &impl Variables, stderr: &mut impl Write) -> Result<(), Failure> {
    config.since(SpecVersion(0, 4, 0))?;
    let subject = Subject::read(variables)?;
    let previous = config.previous()?;
    let Some(pod) = concerned(config, &subject) else { return Ok(()) };
    let netns = netns(&subject)?;
    let command = Command::Check(attachment(&subject, pod, &previous));
    match ask(&config.socket, command, Some(netns.as_fd()), CHECK_LIMIT) {
        Ok(answer) => accepted(answer, pod),
        Err(reason @ NoAnswer::Broken(_)) => Err(unanswered(pod, &reason)),
        Err(reason) => match without_agent(config, pod) {
            Verdict::Free => {
                let _ = writeln!(stderr, "underpass-cni: {} was not checked: {reason}", told(pod));
                Ok(())
            }
            verdict => Err(held(pod, &reason, &verdict)),
        },
    }
}

/// Tells the agent that a pod goes. Whatever is wrong with that, the pod can go.
pub(super) fn del(variables: &impl Variables, input: &[u8], stderr: &mut impl Write) {
    let tell = || -> Result<(), String> {
        let config = Config::parse(input).map_err(|failure| failure.message)?;
        let container = environment::container(variables).map_err(|failure| failure.message)?;
        let pod = variables.text("CNI_ARGS").and_then(|args| pod(&args)).unwrap_or_default();
        if pod.as_ref().is_some_and(|pod| config.exempt.contains(&pod.namespace)) {
            return Ok(());
        }
        match ask(&config.socket, Command::Del(Removal { container, pod }), None, DEL_LIMIT) {
            Ok(Answer::Done { .. }) => Ok(()),
            Ok(Answer::Refused { message, .. }) => Err(message),
            Err(reason) => Err(reason.to_string()),
        }
    };
    if let Err(reason) = tell() {
        let _ = writeln!(stderr, "underpass-cni: DEL goes on without the agent: {reason}");
    }
}

/// Tells the agent which pods there still are.
pub(super) fn gc(config: &Config, stderr: &mut impl Write) -> Result<(), Failure> {
    config.since(SpecVersion(1, 1, 0))?;
    let reason = match config.valid() {
        None => "the runtime does not say which attachments are valid (cni.dev/valid-attachments)".to_owned(),
        Some(valid) => match ask(&config.socket, Command::Gc { valid }, None, CHECK_LIMIT) {
            Ok(Answer::Done { .. }) => return Ok(()),
            Ok(Answer::Refused { message, .. }) => message,
            Err(reason) => reason.to_string(),
        },
    };
    let _ = writeln!(stderr, "underpass-cni: GC collects nothing: {reason}");
    Ok(())
}

/// Says whether pods can be added, at least those that are none of the mesh's business.
pub(super) fn status(config: &Config, stderr: &mut impl Write) -> Result<(), Failure> {
    config.since(SpecVersion(1, 1, 0))?;
    let reason = match ask(&config.socket, Command::Status, None, CHECK_LIMIT) {
        Ok(Answer::Done { .. }) => return Ok(()),
        Ok(Answer::Refused { message, .. }) => return Err(Failure::new(Code::Unavailable, message)),
        Err(reason) => reason,
    };
    match Projection::read(&config.projection) {
        Ok(_) => {
            let _ = writeln!(stderr, "underpass-cni: only pods outside of the mesh can be added: {reason}");
            Ok(())
        }
        Err(error) => Err(Failure::new(
            Code::Unavailable,
            format!(
                "no pod can be added: {reason}, and {} cannot be read: {error}. {REMEDY}",
                config.projection.display()
            ),
        )),
    }
}

/// The pod, if the agent has to be asked about it. A static pod has no identity and is never in the mesh, and those of a
/// control plane have to start before there is any agent.
fn concerned<'a>(config: &Config, subject: &'a Subject) -> Option<&'a PodName> {
    subject.pod.as_ref().filter(|pod| !config.exempt.contains(&pod.namespace) && !pod.is_static())
}

fn netns(subject: &Subject) -> Result<File, Failure> {
    File::open(&subject.netns).map_err(|error| {
        let path = subject.netns.display();
        Failure::new(Code::Environment, format!("CNI_NETNS: opening the pod's network namespace {path}: {error}"))
    })
}

fn attachment(subject: &Subject, pod: &PodName, previous: &Previous<'_>) -> Attachment {
    Attachment {
        container: subject.container.clone(),
        interface: subject.interface.clone(),
        netns: subject.netns.clone(),
        pod: pod.clone(),
        addresses: previous.addresses.clone(),
    }
}

fn accepted(answer: Answer, pod: &PodName) -> Result<(), Failure> {
    match answer {
        Answer::Done { .. } => Ok(()),
        Answer::Refused { message, retry } => {
            let code = if retry { Code::TryLater } else { Code::Refused };
            Err(Failure::new(code, format!("{}: {message}", told(pod))))
        }
    }
}

/// What to do about an agent that is not there.
const REMEDY: &str = "See kubectl -n underpass-system get pods -o wide; the kubelet tries again by itself";

/// What is known of a pod's namespace while no agent runs.
enum Verdict {
    Free,
    Held,
    /// With what is missing.
    Unknown(String),
}

fn without_agent(config: &Config, pod: &PodName) -> Verdict {
    let path = config.projection.display();
    match Projection::read(&config.projection) {
        Ok(projection) => match projection.namespaces.get(&pod.namespace) {
            Some(Treatment::Free) => Verdict::Free,
            Some(Treatment::Held) => Verdict::Held,
            None => Verdict::Unknown(format!("{path} does not know it")),
        },
        Err(error) => Verdict::Unknown(format!("{path} cannot be read: {error}")),
    }
}

fn held(pod: &PodName, reason: &NoAnswer, verdict: &Verdict) -> Failure {
    let namespace = match verdict {
        Verdict::Unknown(missing) => {
            format!("whether namespace {:?} is in the mesh is not known ({missing})", pod.namespace)
        }
        Verdict::Held | Verdict::Free => format!("namespace {:?} has pods in the mesh", pod.namespace),
    };
    Failure::new(Code::TryLater, format!("{} is held back: {reason}, and {namespace}. {REMEDY}", told(pod)))
}

fn unanswered(pod: &PodName, reason: &NoAnswer) -> Failure {
    Failure::new(Code::TryLater, format!("{} is held back: {reason}. {REMEDY}", told(pod)))
}

fn told(pod: &PodName) -> String {
    format!("pod {}/{}", pod.namespace, pod.name)
}
