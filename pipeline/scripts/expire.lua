#!lua flags=allow-oom
-- expire: end jobs whose deadline has passed while nobody works on them.
-- ARGV[1] at most (jobs)  ARGV[2] life of a completion (ms)
-- Returns: time (us), jobs ended as expired, jobs ended as lost (their entry had vanished).
-- Invariant: a job in the hands of a living consumer is left to it; whoever removes the entry writes the outcome.
local now_us = clock_us()
local now_ms = math.floor(now_us / 1000)
local expired, lost = 0, 0
for _, id in ipairs(call('ZRANGEBYSCORE', KEY.live_index, '-inf', digits(now_ms), 'LIMIT', 0, ARGV[1])) do
  local readable, live = pcall(read_live, id)
  if not readable then
    call('ZADD', KEY.live_index, digits(now_ms + 1000), id) -- a key of a wrong type: an operator must act, others pass
  elseif not live then
    call('ZREM', KEY.live_index, id)
  else
    local text = ended(id, live, 'expired', 'deadline_exceeded', 'the deadline passed while the job was waiting', now_us)
    if live.entry == '' then
      call('ZREM', KEY.delayed, id)
      finish(id, live, text, ARGV[2])
      expired = expired + 1
    else
      local group = group_of(live.stream)
      local owner = pending(live.stream, group, live.entry)
      if owner and call('EXISTS', KEY.worker .. owner) == 1 then
        call('ZADD', KEY.live_index, digits(now_ms + 1000), id) -- look again in a second
      elseif #call('XRANGE', live.stream, live.entry, live.entry) == 0 then
        finish(id, live, ended(id, live, 'failed', 'lost', 'the stream entry of this job vanished', now_us), ARGV[2])
        lost = lost + 1
      else
        if owner then call('XACK', live.stream, group, live.entry) end
        call('XDEL', live.stream, live.entry)
        finish(id, live, text, ARGV[2])
        expired = expired + 1
      end
    end
  end
end
conclude()
return {digits(now_us), expired, lost}
